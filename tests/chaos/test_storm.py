"""The storm in its short form, and its oracle against histories that break each law."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SEED = 20261125

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


def test_a_storm_loses_doubles_and_revives_nothing():
    command = [sys.executable, "-m", "tests.chaos.storm", "--seed", str(SEED), "--tasks", "400", "--strikes", "6"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    line = json.loads(done.stdout)
    assert line["tasks"] >= 400
    assert sum(line["faults"].values()) == 6
    assert (line["lost"], line["duplicated"], line["stale_accepted"], line["log_ok"]) == (0, 0, 0, True)
