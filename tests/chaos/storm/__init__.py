"""Thousands of tasks while parts die, stall and lose their connections: `python -m tests.chaos.storm --seed 1`."""
