"""The fourteen published data sets: one reader a file, one table of what each is (``catalog.py``), and its checks."""
