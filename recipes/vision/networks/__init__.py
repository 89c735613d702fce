"""Backbones, and weights from elsewhere."""
