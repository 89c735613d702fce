"""Recipes built on `bilevel`."""
