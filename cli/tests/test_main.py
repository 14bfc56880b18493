"""The command as a process: what ends up on its streams, and its exit code."""

import subprocess
import sys
from pathlib import Path

import pytest

HIVE = Path(sys.executable).with_name("hive")


def test_the_version_is_told_without_a_home() -> None:
    done = subprocess.run([HIVE, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("hivefabric ")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full is a thing of Linux")
def test_output_that_cannot_be_written_is_one_line_and_exit_code_1() -> None:
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [HIVE, "version", "--json"], stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 1
    assert done.stderr == "error: No space left on device\n"


def test_a_home_where_nothing_was_started_ends_with_3(tmp_path: Path) -> None:
    done = subprocess.run([HIVE, "job", "list", "--home", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 3
    assert "hive up" in done.stderr
