"""How fast the log takes appends, beside two references in the same run.

    python -m benchmarks.log_append         # on a scratch server of its own

- `hive_1x64`: one process, 64 callers, one event per append, a job's stream as precondition.
- `hive_4x16`: four processes with 16 callers each.
- `eventsourcing_1x64`: the stock Postgres recorder of the `eventsourcing` library, 64 threads.
- `copy`: psycopg COPY of rows of the same size into a table without chain, versions or checks: what the
  database could take.

Scenarios alternate over several rounds, so that a busy machine touches all of them; figures are medians of the
rounds with their extremes. Publish ratios, not absolutes.
"""

import asyncio
import json
import os
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import psycopg
import uvloop
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.ids import new_id
from psycopg.conninfo import conninfo_to_dict

from benchmarks.rounds import spreads
from benchmarks.scratch import scratch_log

CALLERS = 64
PROCESSES = 4
EVENTS_PER_TASK = 4
PAYLOAD = json.dumps({"attempt": 1, "executor": new_id(), "session": new_id(), "lease_ms": 6000}).encode()
TYPES = ("TaskCreated", "TaskAssigned", "AttemptStarted", "AttemptSucceeded")
COPY_ROWS = 1_000


async def run(dsn: str, *, seconds: float = 3.0, rounds: int = 3) -> dict[str, Any]:
    """Return rates in events per second and latencies in milliseconds, by scenario.

    Args:
        dsn: a superuser's, to a scratch database whose log was created. What is appended stays there.
        seconds: length of one measurement.
        rounds: how often the scenarios take turns.
    """
    scenarios: dict[str, Callable[[], Awaitable[dict[str, float]]]] = {
        "hive_1x64": lambda: _append_for(dsn, CALLERS, seconds),
        "hive_4x16": lambda: _append_in_processes(dsn, seconds),
        "eventsourcing_1x64": lambda: asyncio.to_thread(_stock_recorder, dsn, seconds),
        "copy": lambda: _copy(dsn, seconds),
    }
    results: dict[str, list[Mapping[str, float]]] = {name: [] for name in scenarios}
    for _ in range(rounds):
        for name, scenario in scenarios.items():
            results[name].append(await scenario())
    return {name: spreads(rows) for name, rows in results.items()}


def _figures(latencies_s: list[float], events: int, elapsed_s: float) -> dict[str, float]:
    ordered = sorted(latencies_s)
    return {
        "events_per_s": events / elapsed_s,
        "p50_ms": ordered[len(ordered) // 2] * 1000,
        "p99_ms": ordered[len(ordered) * 99 // 100] * 1000,
    }


# --- the log ---


async def _append_for(dsn: str, callers: int, seconds: float) -> dict[str, float]:
    latencies: list[float] = []
    async with await LogWriter.open(dsn) as writer:
        started = time.perf_counter()
        await asyncio.gather(*(_caller(writer, started + seconds, latencies) for _ in range(callers)))
        return _figures(latencies, len(latencies), time.perf_counter() - started)


async def _caller(writer: LogWriter, until: float, latencies: list[float]) -> None:
    """Walk tasks through their lives, one event per append, as long as the time lasts."""
    job = new_id()
    await writer.append(Append((_event(job, 1, "JobSubmitted", job),)))
    while True:
        task = new_id()
        for version, type_ in enumerate(TYPES, start=1):
            began = time.perf_counter()
            if began >= until:
                return
            await writer.append(Append((_event(task, version, type_, job),), {job: 1}))
            latencies.append(time.perf_counter() - began)


def _event(stream: str, version: int, type_: str, job: str) -> NewEvent:
    return NewEvent(
        stream, version, type_, 1, PAYLOAD, time.time_ns() // 1000, "scheduler", "owner", correlation=job
    )


async def _append_in_processes(dsn: str, seconds: float) -> dict[str, float]:
    workers = [
        await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "benchmarks.log_append",
            "worker",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            env={**os.environ, "HIVE_BENCH_DSN": dsn},
        )
        for _ in range(PROCESSES)
    ]
    for worker in workers:
        assert worker.stdout is not None
        await worker.stdout.readline()
    answers = await asyncio.gather(*(worker.communicate(f"{seconds}\n".encode()) for worker in workers))
    reports = [json.loads(out) for out, _ in answers]
    latencies = [latency for report in reports for latency in report["latencies_s"]]
    # From the first worker's start to the last one's end: the start of the interpreters does not count.
    elapsed = max(report["ended"] for report in reports) - min(report["started"] for report in reports)
    return _figures(latencies, len(latencies), elapsed)


async def _worker() -> None:
    """Say that imports are done, wait for the go, append, print the latencies."""
    print("ready", flush=True)
    seconds = float(await asyncio.to_thread(sys.stdin.readline))
    latencies: list[float] = []
    async with await LogWriter.open(os.environ["HIVE_BENCH_DSN"]) as writer:
        until = time.perf_counter() + seconds
        started = time.time()
        callers = CALLERS // PROCESSES
        await asyncio.gather(*(_caller(writer, until, latencies) for _ in range(callers)))
        ended = time.time()
    print(json.dumps({"started": started, "ended": ended, "latencies_s": latencies}))


# --- references ---


def _stock_recorder(dsn: str, seconds: float) -> dict[str, float]:
    """Append through the library's own Postgres recorder, as its users do: one thread per caller."""
    from uuid import uuid4

    from eventsourcing.persistence import StoredEvent
    from eventsourcing.postgres import PostgresApplicationRecorder, PostgresDatastore

    info = {key: str(value) for key, value in conninfo_to_dict(dsn).items()}
    latencies: list[float] = []
    with PostgresDatastore(
        info["dbname"],
        info["host"],
        info["port"],
        info["user"],
        info["password"],
        pool_size=CALLERS,
        max_overflow=0,
        connect_timeout=60,
    ) as datastore:
        recorder = PostgresApplicationRecorder(datastore, events_table_name=f"bench_{uuid4().hex[:8]}")
        recorder.create_table()

        def caller() -> None:
            while True:
                stream = uuid4()
                for version in range(1, EVENTS_PER_TASK + 1):
                    began = time.perf_counter()
                    if began >= until:
                        return
                    recorder.insert_events([StoredEvent(stream, version, TYPES[version - 1], PAYLOAD)])
                    latencies.append(time.perf_counter() - began)

        threads = [threading.Thread(target=caller) for _ in range(CALLERS)]
        started = time.perf_counter()
        until = started + seconds
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return _figures(latencies, len(latencies), time.perf_counter() - started)


async def _copy(dsn: str, seconds: float) -> dict[str, float]:
    event, digest, payload = os.urandom(460), os.urandom(32), PAYLOAD
    position = 0
    latencies: list[float] = []
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute("DROP TABLE IF EXISTS bench_copy")
        await conn.execute(
            "CREATE TABLE bench_copy (position bigint PRIMARY KEY, event bytea, hash bytea, payload bytea)"
        )
        started = time.perf_counter()
        while (began := time.perf_counter()) < started + seconds:
            async with (
                conn.cursor() as cursor,
                cursor.copy("COPY bench_copy FROM STDIN (FORMAT BINARY)") as copy,
            ):
                copy.set_types(["int8", "bytea", "bytea", "bytea"])
                for position in range(position + 1, position + COPY_ROWS + 1):  # noqa: B020 - counts on
                    await copy.write_row((position, event, digest, payload))
            latencies.append(time.perf_counter() - began)
        elapsed = time.perf_counter() - started
        await conn.execute("DROP TABLE bench_copy")
    return _figures(latencies, position, elapsed)


# --- on its own ---


async def _on_scratch() -> dict[str, Any]:
    async with scratch_log() as dsn:
        return await run(dsn, seconds=float(os.environ.get("HIVE_BENCH_SECONDS", "3")))


def main() -> None:
    """Run on a scratch server and print the figures as JSON."""
    if sys.argv[1:] == ["worker"]:
        uvloop.run(_worker())
        return
    print(json.dumps(uvloop.run(_on_scratch()), indent=2))


if __name__ == "__main__":
    main()
