"""Benchmarks: each prints a table and appends JSON lines to benchmarks/results/<machine>/."""
