"""Digests of contents, to recognize equal models and objects."""
