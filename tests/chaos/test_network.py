"""The network between a device and the control plane breaks: each has a network namespace of its own.

What holds. The control plane counts a lease of 6 s from the last pull that it answered, the device from the
sending of it. A break that ends before that changes nothing that anybody could see in the log. After a longer one
the attempts of the device are lost and run elsewhere; what the device then reports is late, once per attempt at
most, and changes nothing. Whether packets vanish or connections are reset, the device comes back by itself.
"""

import contextlib
import os
import shutil
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
import yaml
from hive_common.contracts.limits import LEASE_MS
from hive_common.testing.device import Device
from hive_common.testing.faults import Wire, lacking
from hive_common.testing.installation import Installation, assert_exactly_once, wait_until

HERE = Path(__file__).parent
JOB = yaml.safe_load((HERE / "job.yaml").read_text())
LEASE_BUSY = 4
BEGUN_S = 0.3
"""More than a runner computes before its guest does."""

SHORT_S = 1.5
SHORT_MAX_S = 2.5
"""A lost packet is sent again after 0.2, 0.6, 1.4, 3.0 and 6.2 s: after this, well within the lease."""

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(400),
    pytest.mark.skipif(bool(lacking("ip", "nft", "nsenter")), reason=lacking("ip", "nft", "nsenter")),
]

only_long = pytest.mark.skipif("HIVE_CHAOS_ROUNDS" not in os.environ, reason="takes half a minute: make chaos")


@pytest.fixture(scope="module")
def apart():
    """An installation with one executor on one host, and a device on another."""
    home = Path(tempfile.mkdtemp(prefix="hive-net-"))
    with Wire(f"n{os.getpid()}") as wire:
        installation = Installation(home, prefix=wire.in_control([]), namespace=wire.control_namespace)
        try:
            installation.hive("init", "--free-ports", "--executors", "2")
            installation.up(executors=1)
            installation.hive("agent", "push", str(HERE / "agents" / "spin"))
            with Device(installation, "executor-2", address=wire.address, prefix=wire.in_device([])) as device:
                yield installation, device, wire
        finally:
            wire.heal()
            installation.hive("down", check=False)
            shutil.rmtree(home, ignore_errors=True)


def started(installation, device, count, ms):
    """Start a job and return its id, once the device works at it."""
    job = installation.submit({**JOB, "input": {"numbers": list(range(count)), "ms": ms}})
    wait_until(lambda: device.state()["running"] > 0, 60, "the device has work")
    return job


def begun_on(device):
    """Wait until a guest computes on the device. Asking the control plane would take longer than a guest."""
    before = computed(device)
    wait_until(lambda: computed(device) > before + BEGUN_S, 60, "a guest computes on the device")


def computed(device):
    """Return the seconds that processes below the device's own have computed."""
    total_s = 0.0
    for process in psutil.Process(device.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            total_s += process.cpu_times().user
    return total_s


def ended(installation, job, count):
    """Wait for the end of a job, and return its events."""
    wait_until(lambda: installation.get(f"/v1/jobs/{job}")["state"] == "succeeded", 120, "the job has ended")
    events = installation.events(job)
    assert_exactly_once(events)
    audit = installation.verify()
    assert audit["ok"], audit
    return events


def attempts_of(events, device):
    """Return the attempts that were given to the device."""
    return {
        (event["stream"], event["data"]["attempt"])
        for event in events
        if event["type"] == "TaskAssigned" and event["data"]["executor"] == device.id
    }


def of_type(events, kind):
    return [(event["stream"], event["data"]["attempt"]) for event in events if event["type"] == kind]


@only_long
@pytest.mark.parametrize("fault", ["drop", "reset"])
def test_a_break_below_the_lease_changes_nothing(fault, apart):
    installation, device, wire = apart
    count = 12
    while True:
        job = started(installation, device, count, ms=700)
        begun = time.monotonic()
        getattr(wire, fault)()
        time.sleep(SHORT_S)
        wire.heal()
        cut_s = time.monotonic() - begun
        events = ended(installation, job, count)
        if cut_s <= SHORT_MAX_S:
            break  # else the machine was too busy to make a short one
    print(f"{fault} for {cut_s:.1f} s: {len(attempts_of(events, device))} attempts on the device, none lost")
    assert attempts_of(events, device)
    assert of_type(events, "AttemptLost") == []
    assert of_type(events, "AttemptLate") == []


@pytest.mark.parametrize("fault", ["drop", pytest.param("reset", marks=only_long)])
def test_a_break_beyond_the_lease_ends_every_task_once_and_what_comes_afterwards_is_late(fault, apart):
    installation, device, wire = apart
    # A guest that has not begun has nothing to report afterwards, and there are more than end before that is seen.
    count = 16
    job = started(installation, device, count, ms=1_000)
    begun_on(device)
    begun = time.monotonic()
    getattr(wire, fault)()
    events = ended(installation, job, count)
    assert device.state()["state"] == "offline"
    given = attempts_of(events, device)
    lost = set(of_type(events, "AttemptLost"))
    assert lost, "the device held attempts when the wire was cut"
    assert lost <= given

    cut_s = time.monotonic() - begun
    healed = time.monotonic()
    wire.heal()
    wait_until(lambda: device.state()["state"] == "online", 60, "the device is back")
    back_s = time.monotonic() - healed
    # It works again, and by then it has reported what it held: reports go before new work.
    again = started(installation, device, 4, ms=700)
    useful_s = time.monotonic() - healed
    ended(installation, again, 4)
    wait_until(
        lambda: "AttemptLate" in {event["type"] for event in installation.events(job)}, 60, "it reports late"
    )
    after = installation.events(job)
    assert after[: len(events)] == events
    late = of_type(after[len(events) :], "AttemptLate")
    assert {event["type"] for event in after[len(events) :]} == {"AttemptLate"}
    assert len(late) == len(set(late))
    assert set(late) <= lost
    assert_exactly_once(after)
    print(
        f"{fault} for {cut_s:.1f} s: {len(lost)} attempts lost, {len(late)} late; "
        f"online {back_s:.1f} s and at work {useful_s:.1f} s after the network came back"
    )


def guests_of(device):
    """Return the states of the processes in which guests of the device run, by their ids; idle ones included."""
    found = {}
    for process in psutil.Process(device.pid).children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            found[process.pid] = process.status()
    return found


def test_an_order_holds_for_a_device_that_is_cut_off_when_its_lease_has_run_out(apart):
    installation, device, wire = apart
    job = started(installation, device, 8, ms=50_000)
    begun_on(device)
    wire.drop()
    cut = time.monotonic()
    with ThreadPoolExecutor(1) as beside:
        order = beside.submit(installation.hive, "kill", "--all", "--reason", "drill")
        wait_until(lambda: psutil.STATUS_STOPPED in guests_of(device).values(), 60, "its guests stand still")
        still_s = time.monotonic() - cut
        order.result()
    still = {pid for pid, state in guests_of(device).items() if state == psutil.STATUS_STOPPED}
    print(f"guests of a device that is cut off stand still after {still_s:.1f} s; its lease has {LEASE_MS} ms")
    # By its own count; a machine that does other things as well may take so many times as long to look.
    assert still_s <= LEASE_BUSY * LEASE_MS / 1000

    wire.heal()
    wait_until(lambda: not still & guests_of(device).keys(), 60, "back again, it has killed them")
    installation.hive("kill", "--job", job)
    installation.hive("unkill", "--all")
    installation.hive("unkill", "--job", job)
    assert installation.get(f"/v1/jobs/{job}")["state"] in ("cancelling", "cancelled")
    again = started(installation, device, 4, ms=700)
    ended(installation, again, 4)
