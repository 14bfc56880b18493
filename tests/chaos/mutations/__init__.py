"""Safeguards taken out one at a time, each in a copy of the tree: the suite has to notice every one.

`python -m tests.chaos.mutations` runs all of them; a safeguard that nobody misses, or whose text has moved, fails.
"""
