"""What pip installs is what the lock says, and the lock is of these projects: neither was edited by hand."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = ("requirements.txt", "requirements-dev.txt", "requirements-setup.txt")


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    made = ["make", "-s", "exported", f"OUT={folder}", f"BIN={Path(sys.executable).parent}"]
    subprocess.run(made, cwd=ROOT, check=True, timeout=60)
    return folder


@pytest.mark.parametrize("name", FILES)
def test_requirements_are_those_of_the_lock(name: str, exported: Path) -> None:
    assert (ROOT / name).read_text() == (exported / name).read_text(), "make requirements"


def test_the_lock_is_that_of_the_projects() -> None:
    uv = Path(sys.executable).with_name("uv")
    done = subprocess.run(
        [uv, "lock", "--check", "--offline"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
