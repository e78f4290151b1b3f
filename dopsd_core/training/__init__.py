"""Training: the loop, its state, checkpoints, log and randomness."""
