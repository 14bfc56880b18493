"""Processes that wait to be let go, and that end with the one that started them, as real processes."""

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SERVICE = """
import sys
import msgspec
from hive_common.ops.lifecycle import run_process

class Config(msgspec.Struct, frozen=True):
    log_level: str = "INFO"

async def main(config, stop):
    print("begun", flush=True)
    await stop.wait()

print("loaded", flush=True)
run_process("service", Config, main)
"""


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    config = tmp_path / "service.json"
    config.write_text("{}")
    return [sys.executable, "-c", SERVICE, "--config", str(config)]


def start(command: list[str]) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def test_one_that_is_held_begins_when_its_input_ends(command: list[str]) -> None:
    with start([*command, "--held", "--supervised", str(os.getpid())]) as service:
        assert service.stdout is not None and service.stdin is not None
        assert service.stdout.readline() == "loaded\n"
        assert select.select([service.stdout], [], [], 0)[0] == []
        service.stdin.close()
        assert service.stdout.readline() == "begun\n"
        service.terminate()
        assert service.wait(20) == 0


def test_one_that_is_held_can_be_ended(command: list[str]) -> None:
    with start([*command, "--held", "--supervised", str(os.getpid())]) as service:
        assert service.stdout is not None
        assert service.stdout.readline() == "loaded\n"
        service.terminate()
        assert service.wait(20) in (0, -signal.SIGTERM)
        assert service.stdout.read() == ""


def test_one_whose_supervisor_died_while_it_loaded_never_begins(command: list[str]) -> None:
    done = subprocess.run(
        [*command, "--held", "--supervised", str(os.getppid())],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stdout) == (0, "loaded\n")
    assert "the supervisor is gone" in done.stderr
