"""NATS: one way to connect, to answer requests and to ask."""
