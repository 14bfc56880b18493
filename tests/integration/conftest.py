from pathlib import Path

import pytest
from hive_common.testing.fixtures import Database, NatsServer

from .plane import Plane


@pytest.fixture
def plane(database: Database, nats_server: NatsServer, tmp_path: Path) -> Plane:
    """A control plane that is not running yet."""
    return Plane(database, nats_server, tmp_path)
