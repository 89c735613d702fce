"""Parts of any experiment, whatever it trains: run folders, ranks, artifacts, events, statistics, plots."""
