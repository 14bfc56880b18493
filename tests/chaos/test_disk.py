"""A disk is full, or slow, while jobs run.

What holds on a full disk: what needs it is refused with a named error or waits, nothing that was acknowledged is
lost, and everything goes on by itself after space was made. Without PostgreSQL's disk nothing is acknowledged;
without NATS's jobs run as always and only the published events wait; without its spool an executor takes no more
work while others do.

A slow disk makes everything slower and nothing wrong: no lease is lost, since leases do not wait for commits.
"""

import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from hive_common.testing.faults import SlowSync, SmallDisk, lacking, settled_on
from hive_common.testing.installation import Installation, assert_exactly_once, wait_until
from hive_common.testing.witness import Witness, published

HERE = Path(__file__).parent
JOB = {**yaml.safe_load((HERE / "job.yaml").read_text()), "input": {"numbers": [1, 2, 3], "ms": 10}}
LONG = "HIVE_CHAOS_ROUNDS" in os.environ

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]
only_long = pytest.mark.skipif(not LONG, reason="takes a minute: make chaos")
needs_mounts = pytest.mark.skipif(bool(lacking("mount")), reason=lacking("mount"))


@contextmanager
def with_small_disk(part, size_mib):
    """Run an installation that has one of its folders on a small disk."""
    home = Path(tempfile.mkdtemp(prefix="hive-disk-"))
    installation = Installation(home)
    try:
        installation.up(executors=2)
        installation.hive("agent", "push", str(HERE / "agents" / "spin"))
        installation.down()
        with settled_on(home / part, lambda folder: SmallDisk(folder, size_mib)) as disk:
            try:
                installation.up(executors=2)
                yield installation, disk
            finally:
                installation.hive("down", check=False)
    finally:
        installation.hive("down", check=False)
        shutil.rmtree(home, ignore_errors=True)


def filled_until(disk, holds, what):
    """Fill the disk, also with what servers free meanwhile, until something shows."""

    def full():
        disk.fill()
        return holds()

    wait_until(full, 120, what)


@only_long
@needs_mounts
def test_a_full_disk_under_postgres_refuses_submits_and_loses_nothing():
    with with_small_disk("data/postgres", 192) as (installation, disk), Witness(installation, JOB) as witness:
        witness.wait(jobs=5, outcomes=5)
        filled_until(disk, lambda: witness.refused > 0, "submits are refused")
        assert witness.refusals <= {"unavailable", "deadline_exceeded", "resource_exhausted"}
        before = time.monotonic()
        disk.free()
        witness.next_acknowledged()
        back_s = time.monotonic() - before
        witness.leave()
        witness.check(installation)
        print(f"postgres: {witness.refused} refusals {witness.refusals}, acknowledges again after {back_s:.1f} s")


@only_long
@needs_mounts
def test_a_full_disk_under_nats_delays_the_published_events_and_nothing_else():
    with with_small_disk("data/nats", 100) as (installation, disk), Witness(installation, JOB) as witness:
        witness.wait(jobs=3, outcomes=3)
        filled_until(disk, lambda: state_of(installation, "nats") == "unready", "NATS says that it is stuck")
        witness.wait(jobs=5, outcomes=5)
        disk.free()
        freed = time.monotonic()
        witness.leave()
        witness.check(installation)
        wait_until(
            lambda: published(installation) >= installation.verify()["head"], 120, "HIVE_EVENTS is whole again"
        )
        print(f"nats: jobs went on; all events published {time.monotonic() - freed:.1f} s after space was made")


def state_of(installation, name):
    services = installation.json("status", check=False)["services"]
    return next(one["state"] for one in services if one["name"] == name)


@only_long
@needs_mounts
def test_an_executor_whose_spool_is_full_takes_no_work_and_reports_what_it_has_when_it_can():
    # Outcomes that need more than what is left in the last page of the spool's file.
    large = {**JOB, "input": {"numbers": [letter * 20_000 for letter in "abc"], "ms": 10}}
    with (
        with_small_disk("executors/executor-1", 4) as (installation, disk),
        Witness(installation, large) as witness,
    ):
        witness.wait(jobs=3, outcomes=3)
        filled_until(disk, lambda: state_of(installation, "executor-1") == "unready", "the executor is not ready")
        log = installation.home / "logs" / "executor-1.log"
        assert "cannot be written: No space left on device" in log.read_text()
        witness.wait(jobs=5, outcomes=5)  # the other one goes on
        freed = time.monotonic()
        disk.free()
        wait_until(lambda: state_of(installation, "executor-1") == "ready", 60, "it is ready again")
        back_s = time.monotonic() - freed
        witness.leave()
        witness.check(installation)
        print(f"spool: the other executor went on; ready {back_s:.1f} s after space was made")


@pytest.mark.skipif(bool(lacking("strace")), reason=lacking("strace"))
def test_a_slow_disk_under_postgres_makes_jobs_slower_and_nothing_wrong(installation):
    document = {**JOB, "input": {"numbers": list(range(12)), "ms": 10}}
    fast_s, _ = timed(installation, document)
    with SlowSync(installation.pids()["postgres"], delay_ms=400) as slow:
        slow_s, events = timed(installation, document)
        delayed = slow.delayed()
    assert delayed > 0
    assert_exactly_once(events)
    types = {event["type"] for event in events}
    assert "AttemptLost" not in types
    assert "AttemptLate" not in types
    assert installation.verify()["ok"]
    print(f"slow: {delayed} syncs of 0.4 s more; the job took {slow_s:.1f} s instead of {fast_s:.1f} s")


def timed(installation, document):
    """Run a job to its end; return its seconds and its events."""
    begun = time.monotonic()
    job = installation.submit(document)
    wait_until(lambda: installation.get(f"/v1/jobs/{job}")["state"] == "succeeded", 100, "the job has ended")
    return time.monotonic() - begun, installation.events(job)
