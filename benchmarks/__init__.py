"""Benchmarks: one file for each operation, and how they are timed and reported."""
