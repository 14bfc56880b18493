"""Executors whose messages overtake each other and come twice, under leases that some of the delays outlast.

Pulls, reports and their answers go over wires of their own, real executors on one side, the real scheduler on the
other. Attempts are lost and made again; reports come late, twice and behind later ones. In the end each task has
one end and its value, and each attempt at most one late event.
"""

import asyncio
import json
import os
import random
import signal
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import psycopg
import pytest
from hive_common.testing.installation import Installation
from hive_common.testing.shuffle import ShufflingWire

from tests.chaos.storm.oracle import History, read, replay
from tests.chaos.storm.processes import Processes, kill

HERE = Path(__file__).parent
SEED = int(os.environ.get("HIVE_CHAOS_SEED", "20261125"))
ROUNDS = int(os.environ.get("HIVE_CHAOS_ROUNDS", "1"))
TASKS = 100
LEASE_MS = 1_500
RUN_S = 200.0

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(300)]


class Rerouted:
    """The processes of an installation with other configuration than `hive up` wrote."""

    def __init__(self, made: Installation) -> None:
        self._config = made.home / "config"
        self._processes = Processes(made.home)
        self._changed: dict[str, int] = {}

    def change(self, process: str, section: str, **values: Any) -> None:
        """Change the file of a process, and tell it to end."""
        file = self._config / f"{process}.json"
        config = json.loads(file.read_text())
        config.setdefault(section, {}).update(values)
        file.write_text(json.dumps(config))
        pid = self._processes.pid(process)
        assert pid is not None
        self._changed[process] = pid
        kill(pid, signal.SIGTERM)

    async def ready(self) -> None:
        """Return when all of them run anew."""
        await self._processes.all_ready(self._changed)


def history_of(made: Installation) -> History:
    with psycopg.connect(made.admin_dsn(), autocommit=True) as connection:
        return replay(read(connection))


@pytest.mark.parametrize("seed", range(SEED, SEED + ROUNDS))
async def test_messages_that_come_twice_and_out_of_order_change_nothing(own_home: Installation, seed: int) -> None:
    rng = random.Random(seed)
    settings = json.loads((own_home.home / "hive.json").read_text())
    wires = []
    async with AsyncExitStack() as stack:
        rerouted = Rerouted(own_home)
        rerouted.change("scheduler", "extra", lease_ms=LEASE_MS)
        for entry in settings["executors"]:
            wire = ShufflingWire(
                settings["ports"]["nats"],
                random.Random(rng.random()),
                delay_s=0.3,
                stragglers=0.05,
                twice=0.4,
                straggle_s=3.0,
            )
            wires.append(await stack.enter_async_context(wire))
            rerouted.change(entry["name"], "nats", url=f"nats://127.0.0.1:{wire.port}")
        await rerouted.ready()
        numbers = json.dumps(list(range(TASKS)))
        job = str(HERE / "job.yaml")
        arguments = ("run", job, "--input", f"numbers={numbers}", "--input", "ms=20")
        result = await asyncio.to_thread(own_home.json, *arguments, timeout_s=RUN_S)
    assert (result["state"], result["output"]) == ("succeeded", list(range(TASKS)))
    assert all(wire.copies and wire.overtaken for wire in wires)
    history = await asyncio.to_thread(history_of, own_home)
    assert not (history.broken + history.doubled + history.stale)
    tasks = [task for task in history.tasks.values() if task.job == result["job_id"]]
    assert len(tasks) == TASKS
    assert all(len(task.ends) == task.successes == 1 for task in tasks)
    late = sum(sum(task.late.values()) for task in history.tasks.values())
    copies, overtaken = sum(wire.copies for wire in wires), sum(wire.overtaken for wire in wires)
    print(f"{seed=} {copies=} {overtaken=} tasks={TASKS} attempts={result['attempts']} {late=}")
    assert (await asyncio.to_thread(own_home.verify))["ok"]
