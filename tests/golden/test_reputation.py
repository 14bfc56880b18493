"""What a golden history says of its executors stays what it is: rebuilt tables are the same for ever."""

import base64
from pathlib import Path

from hive_common.eventlog.envelope import stored_of
from hive_common.testing.memory_log import MemoryLog, MemoryReader
from hive_scheduler.domain.reputation import Book
from hive_scheduler.reputation import Reputation

from .test_golden import rows_of

HISTORY = Path(__file__).parent / "v1_reputation.jsonl"


class EmptyTable:
    async def load(self, ns: str) -> tuple[int, dict[str, Book]]:
        return 0, {}


def log_of(history: Path, until: int) -> MemoryLog:
    log = MemoryLog()
    log.events.clear()
    log.rows.clear()
    for row in rows_of(history)[:until]:
        event, payload = row["event"].encode(), base64.b64decode(row["payload"])
        stored = stored_of(row["position"], event, bytes.fromhex(row["hash"]), payload)
        log.events.append(stored)
        log.rows.append((stored.position, stored.stream, stored.version, stored.type, event, b"", payload, b""))
        log._by_stream.setdefault(stored.stream, []).append(stored)
    return log


async def folded(until: int, history: Path = HISTORY) -> dict[str, tuple[str, int, int, int, int, int]]:
    """Return standing, valid, invalid, late, lost and in a row of each executor, by the number in its device."""
    log = log_of(history, until)
    reputation = Reputation("default")
    await reputation.load(EmptyTable(), MemoryReader(log))
    order = [stored.stream for stored in log.events if stored.type == "ExecutorRegistered"]
    books = {order.index(executor) + 1: reputation.book(executor) for executor in reputation.executors()}
    return {
        f"d-{device}": (
            *(book.standing, book.counts.valid, book.counts.invalid, book.counts.late, book.counts.lost),
            book.in_a_row,
        )
        for device, book in books.items()
    }


async def test_the_history_says_who_lied_and_who_was_lost() -> None:
    before = await folded(45)
    assert before == {
        "d-1": ("new", 3, 0, 0, 0, 3),
        "d-2": ("new", 3, 0, 0, 0, 3),
        "d-3": ("quarantined", 0, 2, 1, 1, 0),
    }
    del before["d-3"]
    assert await folded(46) == before, "a person trusts it anew"


async def test_canaries_say_who_answered_rightly() -> None:
    assert await folded(1_000, Path(__file__).parent / "v1_canaries.jsonl") == {
        "d-1": ("new", 1, 0, 0, 0, 1),
        "d-2": ("quarantined", 0, 2, 0, 0, 0),
        "d-3": ("new", 0, 0, 0, 1, 0),
    }
