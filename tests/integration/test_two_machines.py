"""A second machine joins over the network: two homes in two network and mount namespaces with a cable between them.

What holds. Of the first machine only REST, gRPC and NATS answer, and only to TLS. The second machine makes outgoing
connections only. A job runs on both; when the cable is cut, what ran on the second machine runs on the first once
the lease is over; when it is mended, the second machine works again by itself. Once revoked it is disconnected at
once, and refused for ever, whichever of both machines is started anew.
"""

import json
import subprocess
import sys
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import yaml
from hive_cli.home import Home
from hive_common.testing.faults import lacking
from hive_common.testing.hosts import Hosts
from hive_common.testing.installation import Installation, assert_exactly_once, wait_until

SPIN = Path(__file__).parents[1] / "chaos" / "agents" / "spin"
JOB = yaml.safe_load((SPIN.parents[1] / "job.yaml").read_text())
NAME = "laptop"
PUBLIC = ("http", "grpc", "nats")

pytestmark = [
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(lacking("ip", "nft")), reason=lacking("ip", "nft")),
]

KNOCK = """
import json, socket, sys
host, ports = sys.argv[1], json.loads(sys.argv[2])
said = {}
for name, port in ports.items():
    with socket.socket() as knock:
        knock.settimeout(5)
        try:
            knock.connect((host, port))
            knock.sendall(b"GET /v1/ca HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n")
            said[name] = knock.recv(4096).decode("latin-1")
        except ConnectionRefusedError:
            said[name] = None
        except OSError:
            said[name] = ""
print(json.dumps(said))
"""
"""Runs on the second machine: what each port answers to somebody without TLS, None where nobody listens."""


class Pair:
    """The installation, and the machine that joins it."""

    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts
        control, device = hosts.control, hosts.device
        self.control = Installation(control.folder / "home", prefix=control.prefix, namespace=control.network)
        self.device = Installation(device.folder / "home", prefix=device.prefix, namespace=device.network)
        self.id = self.used = ""

    def token(self) -> str:
        token: str = self.control.json("executor", "token")["token"]
        return token

    def state(self) -> dict:
        """Return the second machine as the control plane sees it."""
        found = self.control.get("/v1/executors", limit=1000)["executors"]
        return next(one for one in found if one["executor_id"] == self.id)

    def submit(self, count: int, ms: int) -> str:
        return self.control.submit({**JOB, "input": {"numbers": list(range(count)), "ms": ms}})

    def ended(self, job: str) -> list[dict]:
        """Wait until a job has succeeded, and return its events."""
        wait_until(lambda: self.control.get(f"/v1/jobs/{job}")["state"] == "succeeded", 120, "the job has ended")
        events = self.control.events(job)
        assert_exactly_once(events)
        return events

    def assigned(self, events: list[dict]) -> Counter[bool]:
        """Count attempts: those on the second machine under True."""
        return Counter(event["data"]["executor"] == self.id for event in events if event["type"] == "TaskAssigned")


@pytest.fixture(scope="module")
def pair():
    with Hosts() as hosts:
        made = Pair(hosts)
        try:
            made.control.hive("init", "--free-ports")
            made.control.hive("up", "--detach", "--public", hosts.control.address)
            made.control.hive("agent", "push", str(SPIN))
            yield made
        finally:
            hosts.mend()
            for installation in (made.device, made.control):
                installation.hive("down", check=False)


@pytest.fixture(scope="module")
def joined(pair):
    """The pair, once the second machine has joined. A job waits for it, so that its first task is seen."""
    pair.control.hive("executor", "drain", "executor-1")
    job = pair.submit(2, ms=10)
    pair.used = pair.token()
    begun = time.time()
    pair.device.hive("executor", "join", pair.used, "--name", NAME, "--slots", "2", "--free-ports", "--detach")
    ready_s = time.time() - begun
    pair.id = pair.device.json("status")["joined"]["executor_id"]
    events = pair.ended(job)
    pair.control.hive("executor", "undrain", "executor-1")
    first_s = min(event["ts_us"] for event in events if event["type"] == "AttemptSucceeded") / 1e6 - begun
    print(f"joined and ready after {ready_s:.1f} s; first result of a task {first_s:.1f} s after the command began")
    assert pair.assigned(events) == {True: 2}
    return pair


def test_a_machine_that_joins_gets_work_over_tls(joined):
    assert joined.state()["state"] == "online"
    device = joined.device.home
    settings = json.loads((device / "joined.json").read_text())
    assert settings["nats"].startswith("tls://") and settings["gateway"].startswith("https://")
    assert not joined.control.home.is_relative_to(device.parent)
    there = joined.hosts.device.run("ls", "-A", str(joined.control.home.parent))
    assert there == "", "the second machine sees nothing of the first one's disk"


def test_the_second_machine_only_connects_outwards(joined):
    pids, listening = joined.device.pids(), set()
    for pid in pids.values():
        for process in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True)):
            with suppress(psutil.NoSuchProcess):  # a runner may end meanwhile
                connections = process.net_connections(kind="inet")
                listening |= {one.laddr.ip for one in connections if one.status == psutil.CONN_LISTEN}
    assert listening <= {"127.0.0.1", "::1"}
    assert pids


def test_without_tls_nothing_of_the_installation_answers(joined):
    ports = json.loads((joined.control.home / "hive.json").read_text())["ports"]
    host = joined.hosts.control.address
    command = [*joined.hosts.device.prefix, sys.executable, "-c", KNOCK, host, json.dumps(ports)]
    said = json.loads(subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout)
    assert {name for name, answer in said.items() if answer is not None} == set(PUBLIC)
    for name in PUBLIC:
        assert "HTTP/1.1 200" not in said[name] and "BEGIN CERTIFICATE" not in said[name]
        assert "INFO" not in said[name], "NATS tells who it is only to TLS"


def test_a_job_runs_on_both_machines(joined):
    # More than one of them would take ahead, after tasks as short as those before.
    events = joined.ended(joined.submit(96, ms=100))
    shares = joined.assigned(events)
    assert shares[True] and shares[False]


def test_what_a_cut_cable_takes_runs_elsewhere_and_a_mended_one_brings_work_again(joined):
    job = joined.submit(16, ms=3000)
    wait_until(lambda: joined.state()["running"] > 0, 60, "the second machine has work")
    cut = time.monotonic()
    joined.hosts.cut()
    events = joined.ended(job)
    ended_s = time.monotonic() - cut
    lost = {(event["stream"], event["data"]["attempt"]) for event in events if event["type"] == "AttemptLost"}
    assert lost, "the second machine held attempts when the cable was cut"
    assert joined.state()["state"] == "offline"
    joined.control.hive("executor", "drain", "executor-1")
    waiting = joined.submit(2, ms=10)
    mended = time.monotonic()
    joined.hosts.mend()
    assert joined.assigned(joined.ended(waiting)) == {True: 2}
    back_s = time.monotonic() - mended
    joined.control.hive("executor", "undrain", "executor-1")
    wait_until(lambda: joined.device.json("status")["state"] == "ready", 60, "the supervisor knows")
    print(
        f"{len(lost)} attempts lost, ended elsewhere {ended_s:.1f} s after the cut",
        f"work done {back_s:.1f} s after the mend",
        sep="; ",
    )


def test_a_joined_machine_comes_back_after_a_restart_of_either_side_and_of_an_address(joined):
    joined.device.hive("down")
    wait_until(lambda: joined.state()["state"] == "offline", 60, "the second machine is away")
    joined.device.hive("up", "--detach")
    wait_until(lambda: joined.state()["state"] == "online", 60, "the second machine is back")
    joined.control.hive("down")
    joined.hosts.take_address(joined.hosts.control)
    said = joined.control.hive("up", "--detach").stderr
    assert f"{joined.hosts.control.address} is not an address of this machine" in said
    joined.hosts.give_address(joined.hosts.control)
    wait_until(lambda: joined.state()["state"] == "online", 60, "the second machine has found the first one again")
    job = joined.submit(12, ms=200)
    assert joined.assigned(joined.ended(job))[True], "it fetches and stores through the gateway's new listener"


def test_a_used_token_and_a_joined_home_are_refused_and_nothing_is_left(joined):
    again = joined.device.hive("executor", "join", joined.token(), "--detach", check=False)
    assert again.returncode == 2 and "has joined" in again.stderr
    other = joined.hosts.device.folder / "other"
    used = joined.device.hive("executor", "join", joined.used, "--detach", "--home", str(other), check=False)
    assert used.returncode == 1 and "used by another machine" in used.stderr
    assert not other.exists()


def test_a_revoked_machine_is_out_at_once_and_stays_out(joined):
    begun = time.monotonic()
    joined.control.hive("executor", "revoke", NAME, "--yes")
    device = Home(joined.device.home)
    wait_until(lambda: device.supervisor_pid() is None, 60, "the second machine has stopped by itself")
    stopped_s = time.monotonic() - begun
    print(f"revoked: the second machine had stopped {stopped_s:.1f} s later")
    assert joined.state()["state"] == "revoked"
    log = (joined.device.home / "logs" / "supervisor.log").read_text()
    assert "was revoked" in log
    for restart in (lambda: None, lambda: (joined.control.hive("down"), joined.control.hive("up", "--detach"))):
        restart()
        refused = joined.device.hive("up", "--detach", check=False)
        assert refused.returncode == 1 and "revoked" in refused.stderr
        assert joined.state()["state"] == "revoked"
    audit = joined.control.verify()
    assert audit["ok"], audit
