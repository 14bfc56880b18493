"""Ids, clocks and errors: what every member needs and what needs nothing itself."""
