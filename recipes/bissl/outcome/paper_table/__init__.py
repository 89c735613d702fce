"""Table 1 of the paper from finished runs: its rows, and the formats it is written in."""
