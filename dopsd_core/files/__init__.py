"""Files: atomic writes, locks and disk space."""
