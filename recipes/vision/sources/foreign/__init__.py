"""Sources in the layouts of others: Hugging Face datasets, WebDataset shards, any map-style Dataset."""
