"""Datasets: reading, checking and decoding images and captions."""
