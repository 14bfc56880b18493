"""Logs with something in them."""

from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.ids import new_id
from hive_common.testing.fixtures import Database

LIFE = ("TaskCreated", "TaskAssigned", "AttemptSucceeded", "TaskSucceeded")


def event(stream: str, version: int = 1, type_: str = "TaskCreated", payload: bytes = b'{"n":1}') -> NewEvent:
    return NewEvent(
        stream=stream, version=version, type=type_, schema=1, payload=payload, ts_us=1, actor="a", owner="o"
    )


def life(payload: bytes = b'{"n":1}') -> Append:
    """One task from its creation to its end: four events."""
    task = new_id()
    return Append(tuple(event(task, number, type_, payload) for number, type_ in enumerate(LIFE, 1)))


async def fill(database: Database, tasks: int) -> int:
    """Append the lives of some tasks, 4 events each behind the genesis event, and return the head."""
    position = 1
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        for _ in range(tasks):
            position = await writer.append(life())
    return position
