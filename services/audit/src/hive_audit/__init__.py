"""Independent verification of the log, the relay of its events, export."""
