"""Benchmarks. Rates here are for ratios inside one run; machines differ."""
