"""The means to tamper with a log behind the system's back."""

from collections.abc import Callable
from typing import Any

import psycopg
import pytest
from hive_common.testing.fixtures import Database

Tamper = Callable[..., None]


@pytest.fixture
def tamper(database: Database) -> Tamper:
    """Run statements as superuser with the triggers off."""

    def run(*statements: str, **arguments: Any) -> None:
        with psycopg.connect(database.dsn) as conn:
            for table in ("events", "payloads"):
                conn.execute(f"ALTER TABLE log.{table} DISABLE TRIGGER ALL")
            for statement in statements:
                conn.execute(statement, arguments)

    return run
