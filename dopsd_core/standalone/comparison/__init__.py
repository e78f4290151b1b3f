"""`python -m dopsd_core compare`: any training methods on many concepts and seeds, with intervals."""
