"""One storm from an empty home to its line."""

import asyncio
import json
import random
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from hive_common.testing.installation import Installation

from tests.chaos.storm import oracle, plan, strikes
from tests.chaos.storm.clients import Clients
from tests.chaos.storm.line import line_of
from tests.chaos.storm.strikes import Processes, Strike

AGENT = Path(__file__).parents[1] / "agents" / "weather"
EXECUTORS = 3
CLIENTS = 8
KINDS = (*(f"kill {name}" for name in strikes.PROCESSES), "kill executor", "kill runner")
WINDOW = 120
"""Tasks that are always under way, so that every fault meets work."""
CALM_S = 180.0
"""How long what was submitted may take to its end once nothing strikes any more."""
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

    def __init__(self, options: Options, home: Path) -> None:
        self.options = options
        self.installation = Installation(home)
        self.processes = Processes(home)
        self.rng = random.Random(options.seed)
        self.struck: list[Strike] = []
        self.problems: list[str] = []

    async def run(self) -> dict[str, Any]:
        """Everything: up, storm, calm, the look at the log."""
        started = time.monotonic()
        await asyncio.to_thread(self._up)
        clients = self._clients()
        submitting = asyncio.create_task(clients.run(CLIENTS))
        try:
            await self._strike_all(clients)
        except TimeoutError:
            self.problems.append(f"not back within {strikes.BACK_S:g} s: {json.dumps(self.processes.state())}")
        clients.ended = True
        await submitting
        await self._calm()
        audit = await asyncio.to_thread(self.installation.verify)
        history = await asyncio.to_thread(self._history)
        line = line_of(self.options.seed, clients.records, history, self.struck, audit, self.problems)
        return {**line, "seconds": round(time.monotonic() - started, 1)}

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

    async def _strike_all(self, clients: Clients) -> None:
        """Let everything strike in an order drawn from the seed, while the clients' pace follows."""
        kinds = self._kinds()
        for number in range(1, self.options.strikes + 1):
            await asyncio.sleep(self.rng.uniform(0.2, 1.2))
            if not kinds:
                kinds = self._kinds()
            kind = kinds.pop()
            self._say(f"{number}/{self.options.strikes} {kind} ({clients.tasks} tasks)")
            self.struck.append(await self._strike(kind))
            clients.pace = WINDOW + self.options.tasks * number / self.options.strikes
        # The last fault is to see work, too, before the clients stop.
        await asyncio.sleep(2)
        while clients.tasks < self.options.tasks:
            await asyncio.sleep(0.05)

    def _kinds(self) -> list[str]:
        kinds = list(self.options.faults or KINDS)
        self.rng.shuffle(kinds)
        return kinds

    async def _strike(self, kind: str) -> Strike:
        if kind == "kill runner":
            return await strikes.kill_runner(self.processes, self.rng)
        if kind == "kill executor":
            return await strikes.kill_process(self.processes, self.rng.choice(self.processes.executors()))
        return await strikes.kill_process(self.processes, kind.removeprefix("kill "))

    async def _calm(self) -> None:
        """Wait until every job in the log has ended."""
        until = time.monotonic() + CALM_S
        left = -1
        while left and time.monotonic() < until:
            with suppress(psycopg.OperationalError):
                left = await asyncio.to_thread(self._unended)
            await asyncio.sleep(0.2)
        if left:
            self.problems.append(f"{left} jobs have not ended {CALM_S:g} s after the last fault")

    def _unended(self) -> int:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            row = connection.execute(UNENDED).fetchone()
        assert row is not None
        return int(row[0])

    def _history(self) -> oracle.History:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return oracle.replay(oracle.read(connection))

    def _say(self, text: str) -> None:
        if not self.options.quiet:
            print(f"storm: {text}", file=sys.stderr, flush=True)


async def storm(options: Options) -> dict[str, Any]:
    """Run one storm in a home of its own and return its line."""
    home = Path(tempfile.mkdtemp(prefix="hive-storm-"))
    made = Storm(options, home)
    try:
        line = await made.run()
        if not line["ok"]:
            print(made.installation.logs(), file=sys.stderr)
        return line
    finally:
        await asyncio.to_thread(made.installation.hive, "down", check=False)
        if options.keep:
            print(f"storm: {home}", file=sys.stderr)
        else:
            shutil.rmtree(home, ignore_errors=True)
