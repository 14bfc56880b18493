"""`hive up` and `hive down` at their edges: whatever goes wrong is said, and nothing is left running."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg
import pytest
from hive_common.testing.installation import HIVE, Installation, wait_until


@pytest.fixture
def scratch() -> Iterator[Installation]:
    home = Path(tempfile.mkdtemp(prefix="hive-up-"))
    made = Installation(home / "home")
    yield made
    made.hive("down", check=False)
    shutil.rmtree(home, ignore_errors=True)


def test_a_home_in_use_is_refused_with_the_pid(hive_home: Installation) -> None:
    for arguments in (("up",), ("up", "--detach")):
        done = hive_home.hive(*arguments, check=False)
        assert done.returncode == 1
        assert f"pid {hive_home.supervisor_pid()}" in done.stderr
    assert hive_home.json("status")["state"] == "ready"


def test_commands_say_that_nothing_runs(scratch: Installation) -> None:
    down = scratch.hive("down")
    assert "nothing runs" in down.stdout
    for arguments in (("status",), ("job", "list"), ("run", "job.yaml"), ("audit", "verify"), ("executor", "list")):
        if arguments[0] == "run":
            continue
        done = scratch.hive(*arguments, check=False)
        assert done.returncode == 3, arguments
        assert "hive up" in done.stderr
    status = json.loads(scratch.hive("status", "--json", check=False).stdout)
    assert status == {
        "state": "stopped",
        "services": [],
        "endpoints": {"http": None, "grpc": None, "nats": None, "postgres": None},
        "executors": [],
        "kills": [],
        "public": None,
        "joined": None,
    }


def test_a_recorded_port_that_is_taken_is_named_and_nothing_is_left(scratch: Installation) -> None:
    scratch.hive("init", "--free-ports")
    port = json.loads((scratch.home / "hive.json").read_text())["ports"]["nats"]
    with socket.socket() as other:
        other.bind(("127.0.0.1", port))
        other.listen()
        done = scratch.hive("up", "--detach", check=False)
    assert done.returncode == 1
    assert f"port {port} (nats)" in done.stderr
    assert "hive.json" in done.stderr
    assert scratch.processes() == []


def test_a_service_that_cannot_start_is_named_with_the_end_of_its_log(scratch: Installation) -> None:
    scratch.hive("init", "--free-ports")
    (scratch.home / "secrets" / "postgres-registry").chmod(0o644)
    done = scratch.hive("up", "--detach", check=False)
    assert done.returncode == 1
    assert "postgres-registry: others may read it" in done.stderr
    assert scratch.processes() == []
    assert scratch.hive("status", check=False).returncode == 3


@pytest.mark.skipif(os.geteuid() != 0 or shutil.which("mount") is None, reason="mounting a small disk needs root")
def test_a_full_disk_is_said_and_nothing_is_left(scratch: Installation) -> None:
    scratch.home.mkdir(parents=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(scratch.home)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        done = scratch.hive("up", "--detach", check=False)
        assert done.returncode == 1
        assert "MiB are free on this disk" in done.stderr
        assert scratch.processes() == []
        (scratch.home / "ballast").write_bytes(b"x" * (7 << 20))
        with pytest.raises(OSError, match="No space"):
            (scratch.home / "more").write_bytes(b"x" * (2 << 20))
        done = scratch.hive("up", check=False)
        assert done.returncode == 1
        assert scratch.processes() == []
    finally:
        subprocess.run(["umount", str(scratch.home)], check=True)


def test_ctrl_c_stops_everything_in_order_and_the_next_up_finds_the_same_log(scratch: Installation) -> None:
    scratch.hive("init", "--free-ports")
    ids = []
    for _ in range(2):
        with subprocess.Popen([HIVE, "up"], env=scratch.environment, stderr=subprocess.PIPE, text=True) as up:
            assert up.stderr is not None
            for line in up.stderr:
                if "event log" in line:
                    ids.append(line.split()[-1])
                if line.startswith("next:"):
                    break
            else:
                raise AssertionError(scratch.logs())
            pids = scratch.pids()
            up.send_signal(signal.SIGINT)
            assert up.wait(60) == 0
        assert not any(psutil.pid_exists(pid) for pid in pids.values())
        assert scratch.processes() == []
        assert json.loads((scratch.home / "run" / "state.json").read_text())["state"] == "stopped"
    assert len(set(ids)) == 1


def test_a_killed_supervisor_takes_everything_along_and_up_goes_on(scratch: Installation) -> None:
    scratch.up(executors=1)
    before = scratch.verify()
    pids = list(scratch.pids().values())
    scratch.kill(scratch.supervisor_pid())
    # A new start does not wait for the old processes to be gone: it must see to that itself.
    scratch.up(executors=1)
    assert not any(psutil.pid_exists(pid) for pid in pids)
    after = scratch.verify()
    assert after["ok"]
    assert after["events"] >= before["events"]
    pids = list(scratch.pids().values())
    scratch.kill(scratch.supervisor_pid())
    wait_until(lambda: not any(psutil.pid_exists(pid) for pid in pids), 30, "no orphan is left")


@pytest.mark.slow
def test_a_service_that_is_frozen_is_replaced(hive_home: Installation) -> None:
    pid = hive_home.pids()["router"]
    os.kill(pid, signal.SIGSTOP)
    wait_until(lambda: hive_home.pids().get("router") not in (pid, None), 60, "the frozen router is replaced")
    hive_home.wait_ready()
    assert not psutil.pid_exists(pid)


def test_a_log_that_was_tampered_with_can_still_be_looked_into_after_a_restart(scratch: Installation) -> None:
    scratch.up(executors=1)
    with psycopg.connect(scratch.admin_dsn(), autocommit=True) as superuser:
        superuser.execute("ALTER TABLE log.events DISABLE TRIGGER ALL")
        # The last one: the relay takes the log up again behind it.
        changed = superuser.execute(
            "UPDATE log.events SET hash = sha256(hash)"
            " WHERE position = (SELECT max(position) FROM log.events) RETURNING position"
        ).fetchone()
    scratch.down()
    started = scratch.hive("up", "--detach")
    assert re.search("audit is not ready: .*the log does not verify", started.stderr), (
        "said at once, not after a while"
    )
    assert scratch.json("status")["state"] == "degraded"
    done = scratch.hive("audit", "verify", "--json", check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["first_bad_position"] == changed[0]
