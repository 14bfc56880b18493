"""Faults: what strikes, and how one sees that it has passed."""

import asyncio
import random
import shutil
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass

import psutil
from hive_common.testing.faults import PowerDisk, SlowSync, lacking
from hive_common.testing.installation import Installation
from hive_common.testing.proxy import POSTGRES_READY

from tests.chaos.storm.processes import Processes, family, kill, signal_all
from tests.chaos.storm.wires import Wires

PROCESSES = ("postgres", "nats", "registry", "scheduler", "router", "audit", "gateway")
PAST_LEASE_S = 7.5
"""A lease is 6 s."""
CUT_S = 10.0


@dataclass
class Strike:
    """A fault that happened.

    Attributes:
        kind: such as `kill scheduler`.
        at: when it struck; of one that lasts, when it ended (seconds since the epoch).
        ready_at: when every process said that it is ready again, what was killed with a new pid.
        alone: no other fault struck before it had passed.
        executor: the id of the executor that was hit.
    """

    kind: str
    at: float
    ready_at: float | None = None
    alone: bool = True
    executor: str = ""


class Strikes:
    """Everything that can strike an installation.

    Args:
        installation: that runs.
        processes: of it.
        wires: between them.
        executors: how many it has.
        rng: seeded.
        disk: under its home, where the power can be cut.
    """

    def __init__(
        self,
        installation: Installation,
        processes: Processes,
        wires: Wires,
        executors: int,
        rng: random.Random,
        disk: PowerDisk | None,
    ) -> None:
        self._installation = installation
        self._disk = disk
        self._processes = processes
        self._wires = wires
        self._count = executors
        self._rng = rng
        self.kinds: dict[str, Callable[[], Awaitable[Strike]]] = {
            **{f"kill {name}": self._killer(name) for name in PROCESSES},
            "kill executor": self._kill_executor,
            "kill runner": self._kill_runner,
            "kill backend": self._kill_backend,
            "kill supervisor": self._kill_supervisor,
            "kill during commit": self._kill_during_commit,
            "freeze executor": self._freeze_executor,
            "freeze scheduler": lambda: self._freeze("scheduler", PAST_LEASE_S),
            "freeze postgres": lambda: self._freeze("postgres", 3),
            "freeze nats": lambda: self._freeze("nats", PAST_LEASE_S),
            "cut executors": self._cut_executors,
            "cut database": self._cut_database,
            "cut commit": self._cut_commit,
            "cut answer to commit": self._cut_answer,
            "silent network": self._silent_network,
            "nats store deleted": self._delete_nats_store,
        }
        if not lacking("strace"):
            self.kinds["slow fsync"] = self._slow_sync
        if disk is not None:
            self.kinds["power cut"] = self._cut_power

    async def strike(self, kind: str) -> Strike:
        """Strike, and return when everything is ready again.

        Raises:
            TimeoutError: something is not.
        """
        return await self.kinds[kind]()

    # --- kill -9 -------------------------------------------------------------------------------------------

    def _killer(self, name: str) -> Callable[[], Awaitable[Strike]]:
        async def strike() -> Strike:
            return await self._kill(name, f"kill {name}")

        return strike

    async def _kill(self, name: str, kind: str) -> Strike:
        pid = self._processes.pid(name)
        struck = Strike(kind, time.time(), executor=self._processes.executor_id(name))
        if pid is not None:
            kill(pid)
        struck.ready_at = await self._processes.all_ready({} if pid is None else {name: pid})
        return struck

    async def _kill_executor(self) -> Strike:
        return await self._kill(self._rng.choice(self._processes.executors()), "kill executor")

    async def _kill_runner(self) -> Strike:
        executor = self._rng.choice(self._processes.executors())
        runners = self._processes.runners(executor)
        struck = Strike("kill runner", time.time(), executor=self._processes.executor_id(executor))
        if runners:
            kill(self._rng.choice(runners))
        struck.ready_at = await self._processes.all_ready({})
        return struck

    async def _kill_backend(self) -> Strike:
        """The server process of the scheduler's connection: PostgreSQL resets all of them and recovers."""
        postgres, scheduler = self._processes.pid("postgres"), self._processes.pid("scheduler")
        assert postgres is not None
        assert scheduler is not None
        backends = [one.pid for one in family(postgres) if _is_backend_of(one, "hive_scheduler")]
        struck = Strike("kill backend", time.time())
        if backends:
            kill(self._rng.choice(backends))
        struck.ready_at = await self._processes.all_ready({"scheduler": scheduler} if backends else {})
        return struck

    async def _cut_power(self) -> Strike:
        """The disk under the home loses its power, and what was not synced with it; then all is killed."""
        assert self._disk is not None
        tree = family(self._processes.state()["supervisor_pid"])
        struck = Strike("power cut", time.time())
        await asyncio.to_thread(self._disk.cut)
        await asyncio.to_thread(self._installation.kill_everything, tree)
        await asyncio.to_thread(self._disk.restore)
        await self._up_again(struck)
        return struck

    async def _kill_during_commit(self) -> Strike:
        """The scheduler dies while the database has not answered for a while: what it said meanwhile was wrong."""
        postgres = self._processes.pid("postgres")
        frozen = [] if postgres is None else family(postgres)
        signal_all(frozen, signal.SIGSTOP)
        try:
            await asyncio.sleep(1.5)
            pid = self._processes.pid("scheduler")
            struck = Strike("kill during commit", time.time())
            if pid is not None:
                kill(pid)
        finally:
            signal_all(frozen, signal.SIGCONT)
        struck.ready_at = await self._processes.all_ready({} if pid is None else {"scheduler": pid})
        return struck

    async def _kill_supervisor(self) -> Strike:
        """Everything goes with it; `hive up` goes on where the log stands."""
        struck = Strike("kill supervisor", time.time())
        kill(self._processes.state()["supervisor_pid"])
        await self._up_again(struck)
        return struck

    async def _up_again(self, struck: Strike) -> None:
        await asyncio.to_thread(self._installation.up, executors=self._count)
        struck.ready_at = time.time()
        await self._wires.lay()

    # --- SIGSTOP, slow disks -------------------------------------------------------------------------------

    async def _freeze_executor(self) -> Strike:
        return await self._freeze(self._rng.choice(self._processes.executors()), PAST_LEASE_S, "freeze executor")

    async def _freeze(self, name: str, seconds: float, kind: str = "") -> Strike:
        pid = self._processes.pid(name)
        frozen = [] if pid is None else family(pid)
        signal_all(frozen, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            signal_all(frozen, signal.SIGCONT)
        struck = Strike(kind or f"freeze {name}", time.time(), executor=self._processes.executor_id(name))
        struck.ready_at = await self._processes.all_ready({})
        return struck

    async def _slow_sync(self) -> Strike:
        pid = self._processes.pid("postgres")
        if pid is not None:
            slow = await asyncio.to_thread(SlowSync, pid, self._rng.randint(50, 300))
            try:
                await asyncio.sleep(4)
            finally:
                await asyncio.to_thread(slow.remove)
        struck = Strike("slow fsync", time.time())
        struck.ready_at = await self._processes.all_ready({})
        return struck

    # --- connections ---------------------------------------------------------------------------------------

    async def _cut_executors(self) -> Strike:
        self._wires.nats.cut_all()
        return await self._passed("cut executors")

    async def _cut_database(self) -> Strike:
        self._wires.database.cut_all()
        return await self._passed("cut database")

    async def _cut_commit(self) -> Strike:
        """The scheduler's next statement never reaches the database."""
        return await self._cut_at("cut commit", self._wires.database.cut_next_request())

    async def _cut_answer(self) -> Strike:
        """The database does what the scheduler's next statement says; the answer is lost."""
        cut = self._wires.database.cut_next_answer(POSTGRES_READY)
        return await self._cut_at("cut answer to commit", cut)

    async def _cut_at(self, kind: str, cut: asyncio.Event) -> Strike:
        async with asyncio.timeout(CUT_S):
            await cut.wait()
        return await self._passed(kind)

    async def _silent_network(self) -> Strike:
        self._wires.nats.pause()
        try:
            await asyncio.sleep(PAST_LEASE_S)
        finally:
            self._wires.nats.resume()
        return await self._passed("silent network")

    async def _passed(self, kind: str) -> Strike:
        struck = Strike(kind, time.time())
        struck.ready_at = await self._processes.all_ready({})
        return struck

    async def _delete_nats_store(self) -> Strike:
        pid = self._processes.pid("nats")
        if pid is not None:
            signal_all(family(pid), signal.SIGSTOP)
            store = self._installation.home / "data" / "nats"
            await asyncio.to_thread(shutil.rmtree, store, ignore_errors=True)
            store.mkdir(exist_ok=True)
        return await self._kill("nats", "nats store deleted")


def _is_backend_of(process: psutil.Process, user: str) -> bool:
    with suppress(psutil.Error):
        return f"postgres: {user} " in " ".join(process.cmdline())
    return False
