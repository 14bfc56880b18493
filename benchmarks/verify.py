"""How fast the auditor verifies the log, beside merely reading it, in the same run.

    python -m benchmarks.verify             # on a scratch server of its own

- `read`: every row with its payload over the auditor's connection, nothing checked.
- `verify`: what `Audit.Verify` does: read and check, a long log in several processes, their start included.
- `verify_alone`: the same without other processes.
- `check`: the check alone, over rows in memory.

Scenarios alternate over several rounds; figures are medians. Publish ratios, not absolutes.
"""

import asyncio
import json
import os
import time
from contextlib import aclosing
from typing import Any

import uvloop
from hive_audit.checks import verify_log
from hive_audit.log_source import BEFORE_FIRST, LogSource
from hive_audit.range_processes import processes_here
from hive_audit.verifier import Row, Verifier
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.ids import new_id

from benchmarks.rounds import spread
from benchmarks.scratch import scratch_log

LIFE = ("TaskCreated", "TaskAssigned", "AttemptStarted", "AttemptSucceeded", "TaskSucceeded")
PAYLOAD = json.dumps({"attempt": 1, "executor": new_id(), "session": new_id(), "lease_ms": 6000}).encode()
CALLERS = 64
EVENTS = 500_000
ROWS_IN_MEMORY = 100_000


async def run(dsn: str, *, events: int = EVENTS, rounds: int = 3) -> dict[str, Any]:
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
            "verify_alone": lambda: _verify(source, processes=0),
            "check": lambda: _check(rows),
        }
        rates: dict[str, list[float]] = {name: [] for name in scenarios}
        for _ in range(rounds):
            for name, scenario in scenarios.items():
                started = time.perf_counter()
                count = await scenario()
                rates[name].append(count / (time.perf_counter() - started))
    return {"events": events, "processes": processes_here()} | {
        f"{name}_per_s": spread(r) for name, r in rates.items()
    }


async def _length(dsn: str) -> int:
    async with await LogSource.open(dsn) as source:
        head = await source.head()
    return head.position if head else 0


async def _fill(dsn: str, events: int) -> None:
    tasks = iter(range(max(0, events - await _length(dsn)) // len(LIFE)))

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


async def _verify(source: LogSource, processes: int | None = None) -> int:
    result = await verify_log(source, processes=processes)
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


async def _on_scratch() -> dict[str, Any]:
    async with scratch_log() as dsn:
        return await run(dsn, events=int(os.environ.get("HIVE_BENCH_EVENTS", EVENTS)))


def main() -> None:
    """Run on a scratch server and print the figures as JSON."""
    print(json.dumps(uvloop.run(_on_scratch()), indent=2))


if __name__ == "__main__":
    main()
