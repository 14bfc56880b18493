"""The safeguards that a test without servers must miss; `make mutations` takes out all of them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


@pytest.mark.parametrize("what", ["--check", "--quick"])
def test_the_suite_notices_when_a_safeguard_is_gone(what):
    command = [sys.executable, "-m", "tests.chaos.mutations", what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
