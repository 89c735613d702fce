"""What the command lines of all recipes have in common: options from a configuration, exit codes, what a run ran on."""
