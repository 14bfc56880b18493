"""From a kill order to its last effect, with fifty executors connected.

`python -m benchmarks.kill` prints milliseconds. NATS, registry and scheduler are real, the executors verify orders
as real ones do, their guests are coroutines (`tests/integration/crowd.py`). An order begins when it is sent to the
registry; its last effect is the later one of the last guest's end and the last event that says so.
"""

import asyncio
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.rounds import spread

ROUNDS = 20
ROOT = Path(__file__).parent.parent
TEST = "tests/integration/test_kill.py::test_everything_stops_within_its_time"


async def run() -> dict[str, Any]:
    """Measure on this machine, now."""
    return await asyncio.to_thread(_run)


def _run() -> dict[str, Any]:
    # Its servers are fixtures of pytest.
    with tempfile.TemporaryDirectory() as folder:
        figures = Path(folder) / "figures"
        environment = {**os.environ, "HIVE_KILL_ROUNDS": str(ROUNDS), "HIVE_KILL_FIGURES": str(figures)}
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-o", "timeout=600", TEST]
        subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=sys.stderr)
        measured = [json.loads(line) for line in figures.read_text().splitlines()]
    found: dict[str, Any] = {"executors": measured[0]["executors"], "orders_each": ROUNDS}
    for way in ("heard", "answered"):
        found[f"{way}_ms"] = spread(one["ms"] for one in measured if one["way"] == way)
        found[f"{way}_guests_ms"] = spread(one["guests_ms"] for one in measured if one["way"] == way)
    return found


if __name__ == "__main__":
    for name, value in asyncio.run(run()).items():
        print(f"{name:>18}  {value}")
