"""Executors and agents."""
