"""How fast the auditor verifies the log, beside merely reading it, in the same run.

    python -m benchmarks.verify             # on a scratch server of its own

- `read`: every row with its payload over the auditor's connection, nothing checked.
- `verify`: what `Audit.Verify` does: read and check.
- `check`: the check alone, over rows in memory.

Scenarios alternate over several rounds; figures are medians. Publish ratios, not absolutes.
"""

import asyncio
import json
import os
import tempfile
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import psycopg
import uvloop
from hive_audit.checks import verify_log
from hive_audit.log_source import BEFORE_FIRST, LogSource
from hive_audit.verifier import Row, Verifier
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.ids import new_id

from benchmarks.rounds import spread

LIFE = ("TaskCreated", "TaskAssigned", "AttemptStarted", "AttemptSucceeded", "TaskSucceeded")
PAYLOAD = json.dumps({"attempt": 1, "executor": new_id(), "session": new_id(), "lease_ms": 6000}).encode()
CALLERS = 64
ROWS_IN_MEMORY = 100_000


async def run(dsn: str, *, events: int = 200_000, rounds: int = 3) -> dict[str, Any]:
    """Return rates in events per second by scenario.

    Args:
        dsn: a superuser's, to a database whose log was created. It is filled up to `events` events.
        events: length of the log.
        rounds: how often the scenarios take turns.

    Raises:
        RuntimeError: the log does not verify.
    """
    await _fill(dsn, events)
    async with await LogSource.open(dsn) as source:
        rows = await _rows(source, min(events, ROWS_IN_MEMORY))
        scenarios = {
            "read": lambda: _read(source),
            "verify": lambda: _verify(source),
            "check": lambda: _check(rows),
        }
        rates: dict[str, list[float]] = {name: [] for name in scenarios}
        for _ in range(rounds):
            for name, scenario in scenarios.items():
                started = time.perf_counter()
                count = await scenario()
                rates[name].append(count / (time.perf_counter() - started))
    return {"events": events} | {f"{name}_per_s": spread(r) for name, r in rates.items()}


async def _fill(dsn: str, events: int) -> None:
    async with await LogSource.open(dsn) as source:
        head = await source.head()
    tasks = iter(range(max(0, events - (head.position if head else 0)) // len(LIFE)))

    async with await LogWriter.open(dsn) as writer:

        async def append() -> None:
            for _ in tasks:
                task = new_id()
                life = tuple(
                    NewEvent(task, number, type_, 1, PAYLOAD, time.time_ns() // 1000, "bench", new_id())
                    for number, type_ in enumerate(LIFE, 1)
                )
                await writer.append(Append(life))

        await asyncio.gather(*(append() for _ in range(CALLERS)))


async def _rows(source: LogSource, count: int) -> list[Row]:
    found: list[Row] = []
    async with aclosing(source.pages(BEFORE_FIRST, count)) as pages:
        async for rows in pages:
            found += rows
    return found


async def _read(source: LogSource) -> int:
    head = await source.head()
    assert head is not None
    count = 0
    async with aclosing(source.pages(BEFORE_FIRST, head.position)) as pages:
        async for rows in pages:
            count += len(rows)
    return count


async def _verify(source: LogSource) -> int:
    result = await verify_log(source)
    if not result.ok:
        raise RuntimeError(result.reason)
    return result.events


async def _check(rows: list[Row]) -> int:
    verifier = Verifier()
    for start in range(0, len(rows), 2_048):
        verifier.feed(rows[start : start + 2_048])
    result = verifier.finish()
    if not result.ok:
        raise RuntimeError(result.reason)
    return result.events


# --- on its own ---


async def _scratch(directory: Path) -> dict[str, Any]:
    from hive_common.eventlog.log import create_log
    from hive_common.eventlog.migrate import migrate_log
    from hive_common.testing.postgres import EmbeddedPostgres

    server = EmbeddedPostgres(directory)
    server.start()
    try:
        async with await psycopg.AsyncConnection.connect(server.dsn(), autocommit=True) as conn:
            await migrate_log(conn)
            await create_log(conn)
        return await run(server.dsn(), events=int(os.environ.get("HIVE_BENCH_EVENTS", "200000")))
    finally:
        server.stop()


def main() -> None:
    """Run on a scratch server and print the figures as JSON."""
    with tempfile.TemporaryDirectory() as directory:
        print(json.dumps(uvloop.run(_scratch(Path(directory))), indent=2))


if __name__ == "__main__":
    main()
