"""The storm in its short form; `make chaos` runs it whole, `make storm` with any seed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEED = 20261125

FAULTS = "kill during commit,cut answer to commit,cut commit,kill executor,kill backend,two schedulers"
"""What no other test does to a whole installation, and what lasts no longer than a restart."""

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(1_500)]


@pytest.mark.parametrize(
    ("seed", "tasks", "options"),
    [
        pytest.param(SEED, 250, ["--strikes", "6", "--faults", FAULTS], id="short"),
        pytest.param(
            SEED + 1,
            5_000,
            [],
            id="whole",
            marks=pytest.mark.skipif("HIVE_CHAOS_ROUNDS" not in os.environ, reason="minutes: run `make chaos`"),
        ),
    ],
)
def test_a_storm_loses_doubles_and_revives_nothing(seed, tasks, options):
    command = [sys.executable, "-m", "tests.chaos.storm", "--seed", str(seed), "--tasks", str(tasks), *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=1_400, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    line = json.loads(done.stdout)
    print(done.stdout)
    assert line["tasks"] >= tasks
    assert line["faults"], line
    laws = ("lost", "duplicated", "stale_accepted", "unjust")
    assert ([line[law] for law in laws], line["log_ok"]) == ([0] * len(laws), True)
    # What was looked at: judged work of each kind, with lies in it.
    assert all(line["judged"].get(what) for what in ("decisions", "judges", "joins", "lies")), line["judged"]
    assert (line["decisions"]["same"] > 0, line["decisions"]["differs"]) == (True, 0)
