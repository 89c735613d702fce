"""Arms and seeds of a run side by side, in worker processes of this machine."""
