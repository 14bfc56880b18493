"""Pure rules of executors and agents: no clock, no I/O, no transport."""
