"""Images for any recipe: sources, views, networks, losses, optimizers, metrics."""
