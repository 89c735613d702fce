"""The folder of a run, and who may write into it."""
