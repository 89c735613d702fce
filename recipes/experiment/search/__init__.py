"""A search over numbers of a configuration: trials, a queue of them that many workers share, and their records."""
