"""A running installation for tests that need all of it, started once per session and driven like a user's."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import httpx
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
def gateway(hive_home: Installation) -> Iterator[httpx.Client]:
    """REST of the running installation, with the owner's key."""
    key = (hive_home.home / "api-key").read_text().strip()
    url = json.loads((hive_home.home / "hive.json").read_text())["endpoints"]["http"]
    with httpx.Client(base_url=url, headers={"authorization": f"Bearer {key}"}, trust_env=False) as client:
        yield client


@pytest.fixture(scope="session")
def squares(hive_home: Installation) -> Path:
    """The job file of the squares example, its agents published."""
    example = ROOT / "examples" / "squares"
    hive_home.hive("agent", "push", str(example / "square"), str(example / "total"))
    return example / "job.yaml"
