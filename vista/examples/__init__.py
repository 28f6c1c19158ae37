"""Training examples from a log: cuts, windows, batches, negatives."""
