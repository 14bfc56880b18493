"""What a killed supervisor left is found, however that was known, and nothing else is touched."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from hive_cli.home import Home
from hive_cli.supervisor.leftovers import end_leftovers
from hive_cli.supervisor.ports import is_free
from hive_cli.supervisor.state import InstallationState, ProcessState, created_at, write_state

Run = Callable[..., "subprocess.Popen[bytes]"]
IGNORES = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print(flush=True); time.sleep(60)"


@pytest.fixture
def home(tmp_path: Path) -> Home:
    made = Home(tmp_path / "home")
    for folder in (made.run_dir, made.config_dir, made.postgres_dir):
        folder.mkdir(parents=True)
    made.config_file("registry").write_text("{}")
    return made


@pytest.fixture
def run() -> Iterator[Run]:
    started = []

    def make(*arguments: str) -> "subprocess.Popen[bytes]":
        process = subprocess.Popen([sys.executable, "-c", IGNORES, *arguments], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    yield make
    for process in started:
        process.kill()
        process.wait()


def supervised(home: Home, name: str) -> list[str]:
    return ["--config", str(home.config_file(name)), "--supervised", "1234", "--held"]


def test_what_was_listed_is_ended(home: Home, run: Run) -> None:
    left, reused = run(), run()
    entries = (
        ProcessState("gateway", "ready", left.pid, 0, created_at(left.pid)),
        ProcessState("registry", "ready", reused.pid, 0, created_at(reused.pid) - 60),
        ProcessState("audit", "starting", None, 0),
    )
    write_state(home, InstallationState("ready", 1, entries))
    assert end_leftovers(home) == ["gateway"]
    assert left.wait() == -signal.SIGKILL
    assert reused.poll() is None, "its pid belongs to somebody else by now"


def test_what_was_not_listed_yet_is_ended_too(home: Home, run: Run) -> None:
    registry = run(*supervised(home, "registry"))
    nats = run("--config", str(home.nats_config_file))
    postgres = run("-D", str(home.postgres_dir))
    assert end_leftovers(home) == ["nats", "postgres", "registry"]
    assert [one.wait() for one in (registry, nats, postgres)] == [-signal.SIGKILL] * 3


def test_others_are_left_alone(home: Home, run: Run, tmp_path: Path) -> None:
    other = Home(tmp_path / "other")
    others = [
        run(*supervised(other, "registry")),
        run("--config", str(home.config_file("registry")), "--supervised"),  # by hand
        run(str(home.config_file("registry"))),  # an editor
        run("--config", str(other.nats_config_file)),
        run("-D", str(other.postgres_dir)),
    ]
    assert end_leftovers(home) == []
    assert [one.poll() for one in others] == [None] * len(others)


def test_a_server_gets_a_moment_to_end_in_order(home: Home) -> None:
    code = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit(7)); print(flush=True)"
    server = subprocess.Popen(
        [sys.executable, "-c", f"{code}; time.sleep(60)", "-D", str(home.postgres_dir)], stdout=subprocess.PIPE
    )
    assert server.stdout is not None
    assert server.stdout.readline()
    server.send_signal(signal.SIGINT)
    assert end_leftovers(home) in (["postgres"], [])
    assert server.wait() in (7, -signal.SIGKILL)


def test_what_listened_with_many_threads_has_given_its_port_back(home: Home) -> None:
    code = (
        "import socket, threading, time; listener = socket.create_server(('127.0.0.1', 0));"
        "[threading.Thread(target=time.sleep, args=(60,), daemon=True).start() for _ in range(200)];"
        "print(listener.getsockname()[1], flush=True); time.sleep(60)"
    )
    for _ in range(10):
        command = [sys.executable, "-c", code, *supervised(home, "registry")]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as registry:
            assert registry.stdout is not None
            port = int(registry.stdout.readline())
            assert end_leftovers(home) == ["registry"]
            assert is_free(port)


def test_one_that_is_stopped_in_its_tracks_is_ended(home: Home, run: Run) -> None:
    registry = run(*supervised(home, "registry"))
    registry.send_signal(signal.SIGSTOP)
    until = time.monotonic() + 20
    while psutil.Process(registry.pid).status() != psutil.STATUS_STOPPED:
        assert time.monotonic() < until
        time.sleep(0.01)
    assert end_leftovers(home) == ["registry"]
    assert registry.wait() == -signal.SIGKILL
