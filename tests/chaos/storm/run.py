"""One storm from an empty home to its line."""

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from hive_common.testing.faults import PowerDisk, lacking
from hive_common.testing.installation import Installation

from tests.chaos.storm import oracle, plan
from tests.chaos.storm.clients import Clients
from tests.chaos.storm.line import line_of
from tests.chaos.storm.processes import BACK_S, Processes
from tests.chaos.storm.strikes import Strike, Strikes
from tests.chaos.storm.wires import Echo, Wires

AGENT = Path(__file__).parents[1] / "agents" / "weather"
EXECUTORS = 3
CLIENTS = 8
TOGETHER = 0.2
"""Part of the strikes that come two at a time."""
WINDOW = 120
"""Tasks that are always under way, so that every fault meets work."""
CALM_S = 180.0
"""How long what was submitted may take to its end once nothing strikes any more."""
HEAD = "SELECT max(position) FROM log.events"
DECIDED = "SELECT count(*) FROM log.events WHERE position > %s AND type = 'TaskSucceeded'"
UNENDED = """
SELECT count(*) FROM log.events j WHERE j.type = 'JobSubmitted' AND NOT EXISTS (
    SELECT FROM log.events e WHERE e.stream = j.stream AND e.type IN ('JobSucceeded', 'JobFailed', 'JobCancelled'))
"""


@dataclass(frozen=True)
class Options:
    seed: int
    tasks: int
    strikes: int
    faults: tuple[str, ...] = ()
    keep: bool = False
    quiet: bool = False


class Storm:
    """An installation, its clients, and what strikes it."""

    def __init__(self, options: Options, home: Path, disk: PowerDisk | None) -> None:
        self.options = options
        self.disk = disk
        self.installation = Installation(home)
        self.processes = Processes(home)
        self.rng = random.Random(options.seed)
        self.struck: list[Strike] = []
        self.problems: list[str] = []

    async def run(self) -> dict[str, Any]:
        """Everything: up, storm, calm, the look at the log."""
        started = time.monotonic()
        load_before = round(os.getloadavg()[0], 1)
        await asyncio.to_thread(self._up)
        clients = self._clients()
        home = self.installation.home
        async with Wires(home, self.processes) as wires, Echo(home, random.Random(self.options.seed)) as echo:
            strikes = Strikes(self.installation, self.processes, wires, EXECUTORS, self.rng, self.disk)
            await self._rage(clients, strikes)
            await self._calm()
        audit = await asyncio.to_thread(self.installation.verify)
        history = await asyncio.to_thread(self._history)
        line = line_of(self.options.seed, clients.records, history, self.struck, audit, self.problems)
        seconds = round(time.monotonic() - started, 1)
        # Times mean something only beside what else the machine had to do.
        load = [load_before, round(os.getloadavg()[0], 1)]
        return {**line, "echoed": echo.repeated, "forged": echo.forged, "seconds": seconds, "load": load}

    async def _rage(self, clients: Clients, strikes: Strikes) -> None:
        submitting = asyncio.create_task(clients.run(CLIENTS))
        try:
            await self._strike_all(clients, strikes)
        except TimeoutError:
            self.problems.append(f"not back within {BACK_S:g} s: {json.dumps(self.processes.state())}")
        clients.ended = True
        await submitting

    def _up(self) -> None:
        self.installation.up(executors=EXECUTORS)
        self.installation.hive("agent", "push", str(AGENT))
        self.dsn = self.installation.admin_dsn()

    def _clients(self) -> Clients:
        home = self.installation.home
        url = json.loads((home / "hive.json").read_text())["endpoints"]["http"]
        key = (home / "api-key").read_text().strip()
        jobs = plan.jobs(random.Random(self.options.seed), self.options.tasks)
        trickle = plan.trickle(random.Random(self.options.seed))
        clients = Clients(url, key, jobs, trickle, random.Random(self.options.seed))
        clients.pace = WINDOW
        return clients

    async def _strike_all(self, clients: Clients, strikes: Strikes) -> None:
        """Let everything strike in an order drawn from the seed, while the clients' pace follows."""
        kinds: list[str] = []
        while (number := len(self.struck)) < self.options.strikes:
            await asyncio.sleep(self.rng.uniform(0.2, 1.2))
            while len(kinds) < 2:
                kinds = [*self._kinds(strikes), *kinds]
            now = [kinds.pop() for _ in range(1 + (self.rng.random() < TOGETHER))]
            self._say(f"{number + 1}/{self.options.strikes} {' + '.join(now)} ({clients.tasks} tasks)")
            struck = await asyncio.gather(*(strikes.strike(kind) for kind in now))
            for strike in struck:
                strike.alone = len(struck) == 1
            self.struck += struck
            clients.pace = WINDOW + self.options.tasks * len(self.struck) / self.options.strikes
        await self._until_work_is_done(clients)
        while clients.tasks < self.options.tasks:
            await asyncio.sleep(0.05)

    async def _until_work_is_done(self, clients: Clients) -> None:
        """Let the last fault see work, too: a submit that is acknowledged and a task that is decided since."""
        after, position = time.time(), -1
        async with asyncio.timeout(BACK_S):
            while True:
                with suppress(psycopg.OperationalError):
                    if position < 0:
                        position = await asyncio.to_thread(self._number, HEAD)
                    decided = await asyncio.to_thread(self._number, DECIDED, position)
                    if decided and any((record.acknowledged_at or 0) > after for record in clients.records):
                        return
                await asyncio.sleep(0.1)

    def _kinds(self, strikes: Strikes) -> list[str]:
        kinds = list(self.options.faults or strikes.kinds)
        self.rng.shuffle(kinds)
        return kinds

    async def _calm(self) -> None:
        """Wait until every job in the log has ended."""
        until = time.monotonic() + CALM_S
        left = -1
        while left and time.monotonic() < until:
            with suppress(psycopg.OperationalError):
                left = await asyncio.to_thread(self._number, UNENDED)
            await asyncio.sleep(0.2)
        if left:
            self.problems.append(f"{left} jobs have not ended {CALM_S:g} s after the last fault")

    def _number(self, query: str, *parameters: int) -> int:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            row = connection.execute(query.encode(), parameters).fetchone()
        assert row is not None
        return int(row[0])

    def _history(self) -> oracle.History:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return oracle.replay(oracle.read(connection))

    def _say(self, text: str) -> None:
        if not self.options.quiet:
            print(f"storm: {text}", file=sys.stderr, flush=True)


async def storm(options: Options) -> dict[str, Any]:
    """Run one storm in a home of its own and return its line. SIGTERM ends it, and everything it started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    folder = Path(tempfile.mkdtemp(prefix="hive-storm-"))
    home = folder / "home"
    wants_disk = not lacking("mkfs.ext4", "mount") and (not options.faults or "power cut" in options.faults)
    disk = PowerDisk(folder / "disk.img", home) if wants_disk else None
    made = Storm(options, home, disk)
    try:
        line = await made.run()
        if not line["ok"]:
            print(made.installation.logs(), file=sys.stderr)
        return line
    finally:
        await asyncio.to_thread(made.installation.hive, "down", check=False)
        if options.keep:
            print(f"storm: {folder}", file=sys.stderr)
        else:
            if disk is not None:
                disk.remove()
            shutil.rmtree(folder, ignore_errors=True)
