"""The scheduler's real code against a world that is made up, from one seed: time, network, database, executors."""
