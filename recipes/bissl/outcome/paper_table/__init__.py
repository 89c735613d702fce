"""Table 1 of the paper from finished runs."""
