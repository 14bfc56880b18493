"""Kill orders on a device: what they stop stops at once, and nothing else gets an order obeyed."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from hive_common.contracts.messages import KILL_SUBJECT, KillOrder
from hive_common.control.verifier import FORGED, LOWER_EPOCH, REFUSED, REPLAYED
from hive_common.testing.kills import KillKey

WAIT_S = 20.0
LEASE_MS = 1_000
"""So short that a guest of five seconds is at work when it runs out, however late this process gets its turn."""


async def until(condition: Callable[[], Any], what: str) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_S:g} s until {what}"
        await asyncio.sleep(0.01)


def runners() -> set[int]:
    """Processes in which guests run, of this test."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if any("hive_executor.sandbox.runner" in part for part in process.cmdline()):
                found.add(process.pid)
    return found


@pytest.fixture
def kill_key(home) -> KillKey:
    key = KillKey()
    home.config = msgspec.structs.replace(home.config, kill_public_key=key.public)
    return key


async def publish(control, signed: KillOrder) -> None:
    await control._client.publish(KILL_SUBJECT, msgspec.json.encode(signed))


def knows(control, epoch: int) -> Callable[[], bool]:
    return lambda: bool(control.pulls) and control.pulls[-1].kill_epoch == epoch


@pytest.mark.parametrize("scope", ["all", "agent", "version", "executor", "job"])
async def test_a_guest_that_an_order_names_dies_with_its_runner(home, control, agent, kill_key, scope) -> None:
    order = {
        "all": ("all", ""),
        "agent": ("agent", "probe"),
        "version": ("agent", "probe@1.0.0"),
        "executor": ("executor", home.executor_id),
        "job": ("job", control.jobs_id),
    }[scope]
    async with home.running():
        key = control.assign(agent, {"sleep_s": 60})
        await until(lambda: any(r.status == "started" for r in control.reports), "it runs")
        before = runners()
        await publish(control, kill_key.kill(*order))
        await until(lambda: key not in control.held and knows(control, 1)(), "it is gone")
        await until(lambda: not before <= runners(), "its process is gone")
        assert {report.status for report in control.outcomes(key)} <= {"cancelled"}


async def test_guests_that_no_order_names_go_on(home, control, agent, kill_key) -> None:
    async with home.running():
        key = control.assign(agent, {"sleep_s": 1})
        await until(lambda: any(r.status == "started" for r in control.reports), "it runs")
        await publish(control, kill_key.kill("agent", "probe@2.0.0"))
        await until(knows(control, 1), "the order came")
        assert (await control.outcome(key)).status == "succeeded"


async def test_what_is_assigned_although_it_is_stopped_is_given_back(home, control, agent, kill_key) -> None:
    async with home.running():
        await until(lambda: control.pulls, "it pulls")
        await publish(control, kill_key.kill("agent", "probe"))
        await until(knows(control, 1), "the order came")
        report = await control.outcome(control.assign(agent, {}))
        assert (report.status, report.message) == ("cancelled", "a kill order stops agent probe")
        await publish(control, kill_key.lift("agent", "probe"))
        await until(knows(control, 2), "it is lifted")
        assert (await control.outcome(control.assign(agent, {}))).status == "succeeded"


async def test_a_stopped_device_offers_no_slots_until_the_order_is_lifted(home, control, agent, kill_key) -> None:
    async with home.running():
        await until(lambda: control.pulls, "it pulls")
        await publish(control, kill_key.kill("executor", home.executor_id))
        await until(lambda: knows(control, 1)() and control.pulls[-1].slots_free == 0, "it offers none")
        await publish(control, kill_key.lift("executor", home.executor_id))
        await until(lambda: control.pulls[-1].slots_free > 0, "it offers some")


@pytest.mark.parametrize("way", ["pull", "hello"])
async def test_an_order_that_was_not_heard_comes_with_the_next_answer(home, control, agent, kill_key, way) -> None:
    async with home.running():
        key = control.assign(agent, {"sleep_s": 60})
        await until(lambda: any(r.status == "started" for r in control.reports), "it runs")
        signed = kill_key.kill("agent", "probe")
        if way == "pull":
            control.kill = signed
        else:
            control.kill_of_hello = signed
            control.is_known = False
        await until(lambda: key not in control.held and knows(control, 1)(), "it is gone")


async def test_forged_replayed_and_older_orders_are_counted_and_not_obeyed(home, control, agent, kill_key) -> None:
    counted = {reason: REFUSED.labels(reason)._value.get() for reason in (FORGED, REPLAYED, LOWER_EPOCH)}
    async with home.running():
        await until(lambda: control.pulls, "it pulls")
        first, second = kill_key.kill("agent", "probe"), kill_key.lift("agent", "probe")
        for signed in (first, second):
            await publish(control, signed)
        await until(knows(control, 2), "both came")
        for signed in (first, second, KillKey().kill("all")):
            await publish(control, signed)

        def all_counted() -> bool:
            return all(REFUSED.labels(reason)._value.get() == before + 1 for reason, before in counted.items())

        await until(all_counted, "each is counted")
        assert (await control.outcome(control.assign(agent, {}))).status == "succeeded"


async def test_an_older_order_is_not_obeyed_after_a_restart_either(home, control, agent, kill_key) -> None:
    first = kill_key.kill("agent", "probe")
    kept = Path(home.config.state_dir) / "kill-order.json"
    async with home.running():
        await until(lambda: control.pulls, "it pulls")
        signed = kill_key.lift("agent", "probe")
        await publish(control, signed)
        await until(lambda: kept.exists(), "it is written down")
    before = REFUSED.labels(LOWER_EPOCH)._value.get()
    control.pulls.clear()
    async with home.running():
        await until(knows(control, 2), "it remembers")
        await publish(control, first)
        await until(lambda: REFUSED.labels(LOWER_EPOCH)._value.get() == before + 1, "it is refused")
        assert (await control.outcome(control.assign(agent, {}))).status == "succeeded"


async def test_what_is_stopped_stays_so_after_a_restart(home, control, agent, kill_key) -> None:
    kept = Path(home.config.state_dir) / "kill-order.json"
    async with home.running():
        await until(lambda: control.pulls, "it pulls")
        await publish(control, kill_key.kill("agent", "probe"))
        await until(lambda: kept.exists(), "it is written down")
    control.pulls.clear()
    async with home.running():
        await until(knows(control, 1), "the new session pulls")
        report = await control.outcome(control.assign(agent, {}))
        assert report.status == "cancelled"


async def test_an_executor_without_a_key_obeys_no_order(home, control, agent) -> None:
    async with home.running():
        await until(lambda: control.pulls, "it pulls")
        control.kill = KillKey().kill("all")
        assert (await control.outcome(control.assign(agent, {}))).status == "succeeded"


# --- cut off ---


async def test_guests_stand_still_when_the_lease_runs_out_and_go_on_when_it_is_renewed(
    home, control, agent, kill_key
) -> None:
    control.lease_ms = LEASE_MS
    async with home.running():
        key = control.assign(agent, {"sleep_s": 5})
        await until(lambda: any(r.status == "started" for r in control.reports), "it runs")
        control.is_pulling_answered = False
        await until(lambda: stopped_runners(), "it stands still")
        control.is_pulling_answered = True
        assert (await control.outcome(key)).status == "succeeded"
        assert not stopped_runners()


async def test_who_comes_back_learns_of_the_order_before_a_guest_goes_on(home, control, agent, kill_key) -> None:
    control.lease_ms = LEASE_MS
    async with home.running():
        key = control.assign(agent, {"sleep_s": 60})
        await until(lambda: any(r.status == "started" for r in control.reports), "it runs")
        control.is_pulling_answered = False
        await until(lambda: stopped_runners(), "it stands still")
        still = stopped_runners()
        control.kill = kill_key.kill("all")
        control.is_pulling_answered = True
        await until(lambda: not still & runners(), "its process is gone")
        await until(lambda: key not in control.held, "and its attempt")
        assert {report.status for report in control.outcomes(key)} <= {"cancelled"}


async def test_a_guest_whose_time_runs_out_while_it_stands_still_is_given_back(
    home, control, agent, kill_key
) -> None:
    control.lease_ms = LEASE_MS
    async with home.running():
        key = control.assign(agent, {"sleep_s": 60}, timeout_ms=5_000)
        await until(lambda: any(r.status == "started" for r in control.reports), "it runs")
        control.is_pulling_answered = False
        await until(lambda: stopped_runners(), "it stands still")
        report = await control.outcome(key)
        assert report.status == "cancelled"
        assert "no lease" in report.message


def stopped_runners() -> set[int]:
    found = set()
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_STOPPED:
                found.add(process.pid)
    return found
