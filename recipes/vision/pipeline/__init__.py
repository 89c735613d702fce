"""From pictures to batches on the device: what is drawn, who makes it, and what waits."""
