"""Recipes: whole experiments on top of `bilevel`, and what they have in common."""
