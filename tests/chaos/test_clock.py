"""Wall clocks are set forward and back by an hour while jobs run.

The rules that hold:

- Leases, timeouts of attempts, waits and retries of the transport run on clocks that nobody can set (CLOCK_BOOTTIME
  and CLOCK_MONOTONIC). A jump of any wall clock loses no lease and ends no attempt.
- A job's deadline and the pause before a retry are written to the log as times of the wall clock, and counted by
  the leader on the boot clock from then on: when the wall clock is set, they move along. They come when they would
  have come. Only a new leader, which knows nothing of the jump, takes what is in the log for what it says.
- `ts_us` of an event is what the writer's wall clock said. It may go back; the order of events is their position,
  and nothing is decided by comparing the times of two machines. The log verifies whatever is written there.
- The clock of a device matters to nobody: an executor that is an hour off takes work, and its reports count.
- PostgreSQL's clock decides nothing: no query of the log or of a view compares with now().
"""

import itertools
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hive_common.testing.device import Device
from hive_common.testing.faults import JumpingClock, lacking
from hive_common.testing.installation import Installation, assert_exactly_once, wait_until

HERE = Path(__file__).parent
JOB = yaml.safe_load((HERE / "job.yaml").read_text())
HOUR_S = 3600
HOUR_US = HOUR_S * 1_000_000

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(lacking("libfaketime")), reason=lacking("libfaketime")),
]

only_long = pytest.mark.skipif("HIVE_CHAOS_ROUNDS" not in os.environ, reason="takes half a minute: make chaos")


@contextmanager
def installed():
    home = Path(tempfile.mkdtemp(prefix="hive-clock-"))
    installation = Installation(home)
    try:
        installation.hive("init", "--free-ports", "--executors", "2")
        yield installation
    finally:
        installation.hive("down", check=False)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="module")
def set_clock(tmp_path_factory):
    """An installation all of whose processes (but NATS, which no library reaches) see a clock that can be set."""
    clock = JumpingClock(tmp_path_factory.mktemp("clock") / "offset")
    with installed() as installation:
        plain = installation.environment
        installation.environment = {**plain, **clock.environment}
        installation.up(executors=2)
        installation.environment = plain
        installation.hive("agent", "push", str(HERE / "agents" / "spin"))
        yield installation, clock


def job_of(count, ms, deadline="5m"):
    return {**JOB, "input": {"numbers": list(range(count)), "ms": ms}, "limits": {"deadline": deadline}}


def state_of(installation, job):
    return installation.get(f"/v1/jobs/{job}")["state"]


def wait_for_events(installation, job, kind, count=1):
    def enough():
        found = installation.get(f"/v1/jobs/{job}/events", limit=1000)["events"]
        return sum(event["type"] == kind for event in found) >= count

    wait_until(enough, 60, f"{count} {kind}")


def finished_unharmed(installation, job, count):
    """Wait for the end of a job, assert that no lease was lost, and return its events."""
    wait_until(lambda: state_of(installation, job) != "running", 120, "the job has ended")
    shown = installation.get(f"/v1/jobs/{job}")
    assert shown["state"] == "succeeded", shown
    events = installation.events(job)
    assert_exactly_once(events)
    assert len([event for event in events if event["type"] == "TaskAssigned"]) == count, "each ran once"
    assert installation.verify()["ok"]
    return events


@pytest.mark.parametrize("hours", [1, pytest.param(-1, marks=only_long)], ids=["forward", "back"])
def test_a_job_does_not_notice_that_the_clock_of_everything_is_set(hours, set_clock):
    installation, clock = set_clock
    count = 8
    restarts = restarts_of(installation)
    job = installation.submit(job_of(count, ms=2_000))
    wait_for_events(installation, job, "TaskSucceeded")
    clock.jump(hours * HOUR_S)
    events = finished_unharmed(installation, job, count)
    stamps = [event["ts_us"] for event in events]
    steps = [later - earlier for earlier, later in itertools.pairwise(stamps)]
    jumps = [step for step in steps if abs(step) > HOUR_US / 2]
    assert len(jumps) >= 1, "the services saw the jump"
    assert restarts_of(installation) == restarts, "no process was restarted for it"
    print(f"{hours:+d} h: {count} tasks, each one attempt; steps of ts_us over half an hour: {len(jumps)}")


def restarts_of(installation):
    return {one["name"]: one["restarts"] for one in installation.json("status")["services"]}


def test_a_deadline_comes_in_time_though_the_clock_is_set_back(set_clock):
    installation, clock = set_clock
    begun = time.monotonic()
    job = installation.submit(job_of(2, ms=50_000, deadline="8s"))
    wait_for_events(installation, job, "TaskAssigned")
    clock.jump(-HOUR_S)
    wait_until(lambda: state_of(installation, job) == "failed", 45, "the deadline has come")
    shown = installation.get(f"/v1/jobs/{job}")
    assert shown["error"]["code"] == "deadline_exceeded", shown
    assert installation.verify()["ok"]
    print(f"deadline of 8 s, clock set back by an hour: over after {time.monotonic() - begun:.1f} s")


@only_long
@pytest.mark.parametrize("hours", [1, -1], ids=["ahead", "behind"])
def test_a_device_with_a_clock_of_its_own_works_like_any_other(hours, tmp_path):
    clock = JumpingClock(tmp_path / "offset")
    clock.jump(hours * HOUR_S)
    with installed() as installation:
        installation.up(executors=1)
        installation.hive("agent", "push", str(HERE / "agents" / "spin"))
        with Device(installation, "executor-2", environment=clock.environment) as device:
            count = 10
            job = installation.submit(job_of(count, ms=500))
            wait_for_events(installation, job, "TaskSucceeded", 2)
            clock.jump(-2 * hours * HOUR_S)
            events = finished_unharmed(installation, job, count)
            mine = [e for e in events if e["type"] == "TaskAssigned" and e["data"]["executor"] == device.id]
            assert mine, "it was given work"
            print(f"device {hours:+d} h, then {-hours:+d} h: {len(mine)} of {count} attempts, none lost")
