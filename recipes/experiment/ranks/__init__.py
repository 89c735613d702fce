"""Several processes (ranks) that make one run: their start and end, which of them are alive, what they must share."""
