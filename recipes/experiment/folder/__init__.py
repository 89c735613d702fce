"""The folder of a run, and leases by which one process at a time writes there."""
