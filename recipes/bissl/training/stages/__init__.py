"""The stages of the pipeline: each turns an artifact into the next; no stage imports another."""
