"""Benchmarks: the cases, the clock, the report."""
