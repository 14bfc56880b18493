"""Real servers for tests, started once per session on free loopback ports, and faults between them."""
