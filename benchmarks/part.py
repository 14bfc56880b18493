"""Runs a part of the benchmarks by itself, and keeps its results with their own date."""

import argparse
import asyncio
import json
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import Any

import uvloop

from benchmarks import report


async def _described(run: Awaitable[dict[str, Any]]) -> dict[str, Any]:
    from benchmarks.__main__ import about  # which imports the parts

    # What was started is stopped then, too: the installation runs in processes that would stay.
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    described = {key: value for key, value in about().items() if key != "versions"}
    result = await run
    described["load_average_after"] = [round(load, 1) for load in os.getloadavg()]
    return {"about": described, **result}


def run_part(section: str, description: str | None, run: Callable[..., Awaitable[dict[str, Any]]]) -> None:
    """Measure, print, and unless it was quick keep the results and write the tables of the documentation.

    Args:
        section: of the results.
        run: takes `quick`, and `rounds` unless the default of the part is good.
    """
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{section}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int)
    parser.add_argument("--quick", action="store_true", help="a little of it: to see that it works")
    given = parser.parse_args()
    chosen = {} if given.rounds is None else {"rounds": given.rounds}
    result = uvloop.run(_described(run(quick=given.quick, **chosen)))
    print(json.dumps(result, indent=2))
    if not given.quick and os.environ.get("HIVE_BENCH_KEEP", "1") != "0":
        print(f"bench: written to {report.keep(section, result)} and {report.DOCUMENT}", file=sys.stderr)
