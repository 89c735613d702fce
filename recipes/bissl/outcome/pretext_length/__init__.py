"""Figure 2 of the paper: test scores over the length of pre-training."""
