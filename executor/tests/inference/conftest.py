"""Devices for these tests."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hive_common.testing.nats import EmbeddedNats

from .place import Places


@pytest.fixture
async def places(nats_server: EmbeddedNats, tmp_path: Path) -> AsyncIterator[Places]:
    made = Places(nats_server, tmp_path)
    yield made
    await made.close()
