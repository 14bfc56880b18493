"""From a kill order to its last effect, with fifty executors connected: real NATS, registry and scheduler.

The executors verify orders with the code of real ones; their guests are coroutines. `benchmarks/kill.py` measures
the same on a quiet machine, where it has to stay within two seconds.
"""

import json
import os
from pathlib import Path

import pytest
from hive_common.contracts.messages import KILL_SUBJECT
from hive_common.testing.fixtures import Database, NatsServer

from tests.integration.crowd import AT_MOST_S, Crowd

EXECUTORS = 50
ROUNDS = int(os.environ.get("HIVE_KILL_ROUNDS", "1"))
BUSY = 4
"""A machine that does other things as well may take so many times as long."""


@pytest.mark.parametrize("heard", [True, False], ids=["order heard", "order lost, learned from the next answer"])
async def test_everything_stops_within_its_time(
    database: Database, nats_server: NatsServer, tmp_path: Path, heard: bool
) -> None:
    async with Crowd(database, nats_server, tmp_path).working(EXECUTORS, listening=heard) as crowd:
        for number in range(1, ROUNDS + 1):
            begun = crowd.now()
            await crowd.give(crowd.key.kill("all", reason="drill"))
            await crowd.until(lambda: not crowd.running())
            guests_s = crowd.now() - begun
            # Nothing was reported of what was stopped, and nothing has failed: it waits.
            await crowd.until_logged("AttemptLost", number * EXECUTORS)
            took_s = crowd.now() - begun
            keep("heard" if heard else "answered", guests_s, took_s)
            assert took_s <= AT_MOST_S * BUSY
            await crowd.give(crowd.key.lift("all"))
            await crowd.all_running()
        logged = await crowd.logged()
        assert logged["TaskAssigned"] == (ROUNDS + 1) * EXECUTORS
        assert not {"AttemptSucceeded", "AttemptFailed", "TaskFailed"} & logged.keys()


def keep(way: str, guests_s: float, took_s: float) -> None:
    """Print a figure, and add it to the file of a benchmark."""
    figure = {"way": way, "executors": EXECUTORS, "guests_ms": guests_s * 1000, "ms": took_s * 1000}
    print(figure)
    if file := os.environ.get("HIVE_KILL_FIGURES"):
        with Path(file).open("a") as figures:
            figures.write(json.dumps(figure) + "\n")


async def test_orders_for_one_device_one_agent_and_one_job_stop_these_alone(
    database: Database, nats_server: NatsServer, tmp_path: Path
) -> None:
    async with Crowd(database, nats_server, tmp_path).working(3) as crowd:
        first, second, third = crowd.members
        of_second = second.job
        await crowd.give(crowd.key.kill("executor", first.id))
        await crowd.until(lambda: not first.guests)
        await crowd.give(crowd.key.kill("job", of_second))
        assert (await crowd.plane.finished(of_second)).state == "cancelled"
        assert third.guests
        await crowd.give(crowd.key.kill("agent", "double@1.0.0"))
        await crowd.until(lambda: not crowd.running())
        for job in crowd.jobs:
            ended = await crowd.plane.finished(job)
            assert job == of_second or (ended.state, ended.error_code) == ("failed", "killed")


async def test_an_order_that_was_played_again_by_somebody_on_nats_changes_nothing(
    database: Database, nats_server: NatsServer, tmp_path: Path
) -> None:
    async with Crowd(database, nats_server, tmp_path).working(2) as crowd:
        old = crowd.key.kill("all")
        await crowd.give(old)
        await crowd.until(lambda: not crowd.running())
        await crowd.give(crowd.key.lift("all"))
        await crowd.all_running()
        before = crowd.refused()
        await crowd.publish(KILL_SUBJECT, old)
        await crowd.until(lambda: crowd.refused() == before + 2)
        assert len(crowd.running()) == 2
