"""A running installation for tests that need all of it, started once per session and driven like a user's."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hive_common.testing.installation import Installation

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="session")
def hive_home() -> Iterator[Installation]:
    """An installation with two executors in a scratch home."""
    home = Path(tempfile.mkdtemp(prefix="hive-e2e-"))
    made = Installation(home)
    try:
        made.up(executors=2)
        yield made
    finally:
        made.hive("down", check=False)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def squares(hive_home: Installation) -> Path:
    """The job file of the squares example, its agents published."""
    example = ROOT / "examples" / "squares"
    hive_home.hive("agent", "push", str(example / "square"), str(example / "total"))
    return example / "job.yaml"
