"""Starts and watches every process of an embedded installation: PostgreSQL, NATS, services, executors."""
