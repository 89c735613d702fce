"""BiSSL: bilevel optimization for self-supervised pre-training and fine-tuning."""
