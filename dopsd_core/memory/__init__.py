"""Memory: gradient checkpointing and estimates of memory and disk space."""
