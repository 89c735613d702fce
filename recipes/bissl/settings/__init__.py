"""What a run is asked for: sections, presets, arms, the paper's numbers."""
