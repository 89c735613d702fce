"""What the features of finished backbones look like: extraction, t-SNE, scores, picture."""
