"""What the tests of the log share."""

from collections.abc import Callable

import pytest
from hive_common.eventlog.log import Append, NewEvent


def event(stream: str, version: int = 1, type: str = "TaskCreated", **fields: object) -> NewEvent:
    values = {"schema": 1, "payload": b'{"n":1}', "ts_us": 1, "actor": "a", "owner": "o", **fields}
    return NewEvent(stream=stream, version=version, type=type, **values)  # type: ignore[arg-type]


@pytest.fixture
def new_append() -> Callable[..., Append]:
    def build(stream: str, version: int = 1, type: str = "TaskCreated", **fields: object) -> Append:
        return Append((event(stream, version, type, **fields),))

    return build
