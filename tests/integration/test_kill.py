"""From a kill order to its last effect, with fifty executors connected: real NATS, registry and scheduler.

The executors verify orders with the code of real ones; their guests are coroutines. `benchmarks/kill.py` measures
the same on a quiet machine, where it has to stay within two seconds.
"""

import pytest
from hive_common.contracts.messages import KILL_SUBJECT
from hive_common.testing.fixtures import Database, NatsServer

from tests.integration.crowd import AT_MOST_S, Crowd

EXECUTORS = 50
BUSY = 4
"""A machine that does other things as well may take so many times as long."""


@pytest.mark.parametrize("heard", [True, False], ids=["order heard", "order lost, learned from the next answer"])
async def test_everything_stops_within_its_time(
    database: Database, nats_server: NatsServer, tmp_path, heard: bool
) -> None:
    async with Crowd(database, nats_server, tmp_path).working(EXECUTORS, listening=heard) as crowd:
        begun = crowd.now()
        await crowd.give(crowd.key.kill("all", reason="drill"))
        await crowd.all_stopped()
        took_s = crowd.now() - begun
        print(
            f"{EXECUTORS} executors, {'heard' if heard else 'by pulls'}: last effect after {took_s * 1000:.0f} ms"
        )
        assert took_s <= AT_MOST_S * BUSY
        # Nothing was reported of what was stopped, and nothing has failed: it waits.
        types = await crowd.types()
        assert types.count("AttemptLost") == EXECUTORS
        assert not {"AttemptSucceeded", "AttemptFailed", "TaskFailed"} & set(types)

        await crowd.give(crowd.key.lift("all"))
        await crowd.all_running()
        assert (await crowd.types()).count("TaskAssigned") == 2 * EXECUTORS


async def test_orders_for_one_device_one_agent_and_one_job_stop_these_alone(
    database: Database, nats_server: NatsServer, tmp_path
) -> None:
    async with Crowd(database, nats_server, tmp_path).working(3) as crowd:
        first, second, _ = crowd.members
        await crowd.give(crowd.key.kill("executor", first.id))
        await first.until_idle()
        await crowd.give(crowd.key.kill("job", second.job))
        await second.until_idle()
        assert len(crowd.running()) == 1
        await crowd.give(crowd.key.kill("agent", "double@1.0.0"))
        await crowd.all_stopped()
        states = sorted([(await crowd.plane.finished(job)).state for job in crowd.jobs])
        assert states == ["cancelled", "failed", "failed"]


async def test_an_order_that_was_played_again_by_somebody_on_nats_changes_nothing(
    database: Database, nats_server: NatsServer, tmp_path
) -> None:
    async with Crowd(database, nats_server, tmp_path).working(2) as crowd:
        old = crowd.key.kill("all")
        await crowd.give(old)
        await crowd.all_stopped()
        await crowd.give(crowd.key.lift("all"))
        await crowd.all_running()
        before = crowd.refused()
        await crowd.publish(KILL_SUBJECT, old)
        await crowd.until(lambda: crowd.refused() == before + 2)
        assert len(crowd.running()) == 2
