"""A search over fields of a configuration: an Optuna study of trials that many workers share, and their records."""
