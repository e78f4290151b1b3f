"""Benchmarks: the scripts behind the figures in the docs."""
