"""What it takes to run a process: configuration, health, metrics, logs, start and stop."""
