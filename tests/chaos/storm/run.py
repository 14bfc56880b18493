"""One storm from an empty home to its line."""

import asyncio
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
from hive_common.testing.faults import PowerDisk, Wire, enter_network, lacking
from hive_common.testing.installation import Installation

from tests.chaos.storm import oracle, plan
from tests.chaos.storm.clients import Clients
from tests.chaos.storm.line import line_of
from tests.chaos.storm.machine import Machine
from tests.chaos.storm.processes import BACK_S, Processes
from tests.chaos.storm.progress import Progress
from tests.chaos.storm.strikes import Strikes
from tests.chaos.storm.target import PROGRAMS, TOUCHES, Strike, Target
from tests.chaos.storm.wires import Echo, Wires

AGENTS = [Path(__file__).parents[1] / "agents" / name for name in ("weather", "witness", "juror")]
EXECUTORS = 3
CLIENTS = 8
TOGETHER = 0.2
"""Part of the strikes that come two at a time."""
WINDOW = 120
"""Tasks that are always under way, so that every fault meets work."""
CALM_S = 180.0
"""How long what was submitted may take to its end once nothing strikes any more."""

IDLE_S = 45.0
"""How long executors may hold what has ended: until a lost answer to a pull has been asked for again."""


@dataclass(frozen=True)
class Options:
    seed: int
    tasks: int
    strikes: int
    faults: tuple[str, ...] = ()
    keep: bool = False
    quiet: bool = False


class Storm:
    """An installation, its clients, and what strikes it.

    Args:
        options: of this storm.
        folder: empty; holds everything.
    """

    def __init__(self, options: Options, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.home = folder / "home"
        self.installation = Installation(self.home)
        self.processes = Processes(self.home)
        self.rng = random.Random(options.seed)
        self.struck: list[Strike] = []
        self.missed: list[str] = []
        self.problems: list[str] = []
        lacked = {kind: lacking(*programs) for kind, programs in PROGRAMS.items() if self._wants(kind)}
        self.left_out = {kind: reason for kind, reason in lacked.items() if reason}
        self._special = lacked.keys() - self.left_out.keys()

    def _wants(self, kind: str) -> bool:
        return not self.options.faults or kind in self.options.faults

    async def run(self) -> dict[str, Any]:
        """Everything: up, storm, calm, the look at the log."""
        started, began_at = time.monotonic(), time.time()
        load_before = round(os.getloadavg()[0], 1)
        async with AsyncExitStack() as stack:
            disk = wire = None
            if self._special & {"power cut", "full disk"}:
                disk = stack.enter_context(PowerDisk(self.folder / "disk.img", self.home))
            if any(kind.startswith("device: ") for kind in self._special):
                wire = stack.enter_context(Wire(f"s{os.getpid()}"))
                stack.enter_context(_network_of(wire))
            stack.push_async_callback(self._down)
            await asyncio.to_thread(self._up, EXECUTORS + (wire is not None))
            clients = self._clients()
            wires = await stack.enter_async_context(Wires(self.home, self.processes, self.options.seed))
            echo = await stack.enter_async_context(
                Echo(self.home, self._own("echo"), random.Random(self.options.seed))
            )
            machine = None
            if wire is not None:
                made = Machine(self.installation, wire, self._own("machine"), f"executor-{EXECUTORS + 1}")
                machine = await stack.enter_async_context(made)
            target = Target(
                self.installation,
                self.processes,
                wires,
                echo,
                clients,
                self.progress,
                EXECUTORS,
                self._own("second"),
                self.rng,
                disk,
                machine,
            )
            await self._rage(clients, Strikes(target))
            await self._calm(echo)
            audit = await asyncio.to_thread(self.installation.verify)
            decisions = await asyncio.to_thread(self.installation.verify, "--decisions", "all")
            self._say(f"decisions: {Counter(r for one in decisions['checks'] for r in one['reasons'])}")
            if decisions["counts"]["differs"] or not decisions["counts"]["same"]:
                told = [one for one in decisions["checks"] if one["result"] == "differs"]
                self.problems.append(f"decisions, made again: {decisions['counts']} {json.dumps(told[:3])}")
            history = await asyncio.to_thread(self._history, began_at)
            line = line_of(
                self.options.seed,
                clients.records,
                history,
                self.struck,
                audit,
                self.problems,
                self.missed,
                self.left_out,
            )
            seconds = round(time.monotonic() - started, 1)
            # Times mean something only beside what else the machine had to do.
            load = [load_before, round(os.getloadavg()[0], 1)]
            if not line["ok"]:
                of_machine = machine.log() if machine else ""
                print(f"{self.installation.logs()}\n--- the other machine\n{of_machine}", file=sys.stderr)
            said = {"echoed": echo.repeated, "forged": echo.forged, "lies": wires.lies}
            return {**line, **said, "decisions": decisions["counts"], "seconds": seconds, "load": load}

    def _own(self, name: str) -> Path:
        """Return a folder outside of the home."""
        folder = self.folder / name
        folder.mkdir()
        return folder

    async def _rage(self, clients: Clients, strikes: Strikes) -> None:
        submitting = asyncio.create_task(clients.run(CLIENTS))
        try:
            await self._strike_all(clients, strikes)
        except TimeoutError:
            self.problems.append(f"not back within {BACK_S:g} s: {json.dumps(self.processes.state())}")
        clients.ended = True
        await submitting

    def _up(self, known: int) -> None:
        """Start three executors of an installation that knows `known`."""
        self.installation.hive("init", "--free-ports", "--executors", str(known))
        self.installation.up(executors=EXECUTORS)
        for agent in AGENTS:
            self.installation.hive("agent", "push", str(agent))
        self.dsn = self.installation.admin_dsn()
        self.progress = Progress(self.dsn)

    async def _down(self) -> None:
        await asyncio.to_thread(self.installation.hive, "down", check=False)

    def _clients(self) -> Clients:
        home = self.home
        url = json.loads((home / "hive.json").read_text())["endpoints"]["http"]
        key = (home / "api-key").read_text().strip()
        jobs = plan.jobs(random.Random(self.options.seed), self.options.tasks)
        trickle = plan.trickle(random.Random(self.options.seed))
        clients = Clients(url, key, jobs, trickle, random.Random(self.options.seed))
        clients.pace = WINDOW
        return clients

    async def _strike_all(self, clients: Clients, strikes: Strikes) -> None:
        """Let everything strike in an order drawn from the seed, while the clients' pace follows."""
        if unknown := set(self.options.faults) - strikes.kinds.keys() - self.left_out.keys():
            raise ValueError(f"no such faults: {', '.join(sorted(unknown))}; there are {', '.join(strikes.kinds)}")
        kinds: list[str] = []
        while (number := len(self.struck)) < self.options.strikes:
            await asyncio.sleep(self.rng.uniform(0.2, 1.2))
            while len(kinds) < 2:
                kinds = [*self._kinds(strikes), *kinds]
            now = [kinds.pop()]
            if self.rng.random() < TOGETHER and not _touch_the_same(now[0], kinds[-1]):
                now.append(kinds.pop())
            self._say(f"{number + 1}/{self.options.strikes} {' + '.join(now)} ({clients.tasks} tasks)")
            struck = await asyncio.gather(*(strikes.strike(kind) for kind in now))
            for kind, strike in zip(now, struck, strict=True):
                if strike is None:
                    self._say(f"{kind} has hit nothing")
                    self.missed.append(kind)
                    kinds.insert(0, kind)
                else:
                    strike.alone = len(struck) == 1
                    self.struck.append(strike)
            if len(self.missed) > self.options.strikes:
                self.problems.append("more faults hit nothing than were to strike")
                break
            clients.pace = WINDOW + self.options.tasks * len(self.struck) / self.options.strikes
        await self._until_work_is_done(clients)
        clients.pace = WINDOW + self.options.tasks
        while clients.tasks < self.options.tasks:
            await asyncio.sleep(0.05)

    async def _until_work_is_done(self, clients: Clients) -> None:
        """Let the last fault see work, too: a submit that is acknowledged and a task that is decided since."""
        after = time.time()
        async with asyncio.timeout(BACK_S):
            await self.progress.decided()
            while not any((record.acknowledged_at or 0) > after for record in clients.records):
                await asyncio.sleep(0.1)

    def _kinds(self, strikes: Strikes) -> list[str]:
        kinds = [kind for kind in self.options.faults or strikes.kinds if kind not in self.left_out]
        self.rng.shuffle(kinds)
        return kinds

    async def _calm(self, echo: Echo) -> None:
        """Wait until every job in the log has ended, and no executor has anything of it any more."""
        until = time.monotonic() + CALM_S
        left: int | None = -1
        while left != 0 and time.monotonic() < until:
            left = await self.progress.unended()
            await asyncio.sleep(0.2)
        if left:
            self.problems.append(f"{left} jobs have not ended {CALM_S:g} s after the last fault")
            return
        until = time.monotonic() + IDLE_S
        while (held := {name: keys for name, keys in echo.held.items() if keys}) and time.monotonic() < until:
            await asyncio.sleep(0.2)
        if held:
            self.problems.append(f"executors hold {held} {IDLE_S:g} s after everything had ended")

    def _history(self, began_at: float) -> oracle.History:
        with psycopg.connect(self.dsn, autocommit=True) as connection:
            return oracle.replay(oracle.read(connection, began_at))

    def _say(self, text: str) -> None:
        if not self.options.quiet:
            print(f"storm: {text}", file=sys.stderr, flush=True)


def _touch_the_same(one: str, other: str) -> bool:
    return one in TOUCHES and TOUCHES[one] == TOUCHES.get(other)


@contextmanager
def _network_of(wire: Wire) -> Iterator[None]:
    """Live on one end of a wire: this thread, all that it starts, and theirs."""
    before = Path(f"/proc/{os.getpid()}/task/{threading.get_native_id()}/ns/net")
    with before.open() as home:
        wire.enter()
        try:
            yield
        finally:
            enter_network(Path(f"/proc/self/fd/{home.fileno()}"))


async def storm(options: Options) -> dict[str, Any]:
    """Run one storm in a home of its own and return its line. SIGTERM ends it, and everything it started."""
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    folder = Path(tempfile.mkdtemp(prefix="hive-storm-"))
    try:
        return await Storm(options, folder).run()
    finally:
        if options.keep:
            print(f"storm: {folder}", file=sys.stderr)
        else:
            shutil.rmtree(folder, ignore_errors=True)
