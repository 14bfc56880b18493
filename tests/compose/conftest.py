"""Collected by `make compose-test` only: it needs a container engine, and minutes."""

import os

collect_ignore_glob = [] if os.environ.get("HIVE_COMPOSE_TEST") == "1" else ["test_*.py"]
