"""The check of a hypergradient against differences of the re-solved lower level."""
