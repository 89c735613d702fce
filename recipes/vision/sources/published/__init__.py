"""Published data sets, one reader a file."""
