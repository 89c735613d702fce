"""BiSSL: bilevel self-supervised pre-training and fine-tuning, as a recipe on `bilevel`."""
