"""Conditions of student and teacher: teacher views, encoding, cache."""
