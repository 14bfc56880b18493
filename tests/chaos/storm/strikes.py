"""Faults of processes and of their connections: what strikes, and how one sees that it has passed."""

import asyncio
import shutil
import signal
import time
from contextlib import suppress
from pathlib import Path

import psutil
from hive_common.testing.faults import SlowSync, lacking
from hive_common.testing.proxy import POSTGRES_READY

from tests.chaos.storm.hosts import HostStrikes
from tests.chaos.storm.processes import family, kill, signal_all
from tests.chaos.storm.target import PAST_LEASE_S, PROGRAMS, Strike, Striker, Target

PROCESSES = ("postgres", "nats", "registry", "scheduler", "router", "audit", "gateway")
CUT_S = 10.0


class Strikes:
    """Everything that can strike an installation.

    Args:
        target: is at work.

    Attributes:
        kinds: by name.
    """

    def __init__(self, target: Target) -> None:
        self._target = target
        self._installation = target.installation
        self._processes = target.processes
        self._wires = target.wires
        self._rng = target.rng
        self.kinds: dict[str, Striker] = {
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
            "slow fsync": self._slow_sync,
            "cut executors": self._cut_executors,
            "cut database": self._cut_database,
            "cut commit": self._cut_commit,
            "cut answer to commit": self._cut_answer,
            "silent network": self._silent_network,
            "nats store deleted": self._delete_nats_store,
            "power cut": self._cut_power,
            **HostStrikes(target).kinds,
        }
        for kind, programs in PROGRAMS.items():
            if lacking(*programs):
                self.kinds.pop(kind, None)
        if target.disk is None:
            del self.kinds["power cut"]

    async def strike(self, kind: str) -> Strike | None:
        """Strike, and return when everything is ready again; None where nothing was hit.

        Raises:
            TimeoutError: something is not ready.
        """
        return await self.kinds[kind]()

    # --- kill -9 -------------------------------------------------------------------------------------------

    def _killer(self, name: str) -> Striker:
        async def strike() -> Strike | None:
            return await self._kill(name, f"kill {name}")

        return strike

    async def _kill(self, name: str, kind: str) -> Strike | None:
        pid = self._processes.pid(name)
        struck = Strike(kind, time.time(), executor=self._processes.executor_id(name))
        return await self._killed(struck, name, pid, kill(pid))

    async def _killed(self, struck: Strike, name: str, pid: int | None, hit: bool) -> Strike | None:
        """Wait for the successor of a process that was hit."""
        struck.ready_at = await self._processes.all_ready({name: pid} if hit and pid is not None else {})
        return struck if hit else None

    async def _kill_executor(self) -> Strike | None:
        return await self._kill(self._rng.choice(self._processes.executors()), "kill executor")

    async def _kill_runner(self) -> Strike | None:
        executor = self._rng.choice(self._processes.executors())
        runners = self._processes.runners(executor)
        struck = Strike("kill runner", time.time(), executor=self._processes.executor_id(executor))
        hit = bool(runners) and kill(self._rng.choice(runners))
        struck.ready_at = await self._processes.all_ready({})
        return struck if hit else None

    async def _kill_backend(self) -> Strike | None:
        """The server process of the scheduler's connection: PostgreSQL resets all of them and recovers."""
        postgres, scheduler = self._processes.pid("postgres"), self._processes.pid("scheduler")
        family_of = [] if postgres is None else family(postgres)
        backends = [one.pid for one in family_of if _is_backend_of(one, "hive_scheduler")]
        struck = Strike("kill backend", time.time())
        hit = bool(backends) and kill(self._rng.choice(backends))
        return await self._killed(struck, "scheduler", scheduler, hit)

    async def _cut_power(self) -> Strike | None:
        """The disk under the home loses its power, and what was not synced with it; then all is killed."""
        disk, home = self._target.disk, self._installation.home
        assert disk is not None
        tree = family(self._processes.state()["supervisor_pid"])
        struck = Strike("power cut", time.time())
        await asyncio.to_thread(disk.cut)
        hit = _refuses(home)
        await asyncio.to_thread(self._installation.kill_everything, tree)
        await asyncio.to_thread(disk.restore)
        await self._up_again(struck)
        return struck if hit else None

    async def _kill_during_commit(self) -> Strike | None:
        """The scheduler dies while the database has not answered for a while: what it said meanwhile was wrong."""
        postgres = self._processes.pid("postgres")
        frozen = [] if postgres is None else family(postgres)
        stopped = signal_all(frozen, signal.SIGSTOP)
        try:
            await asyncio.sleep(1.5)
            pid = self._processes.pid("scheduler")
            struck = Strike("kill during commit", time.time())
            died = kill(pid)
        finally:
            signal_all(frozen, signal.SIGCONT)
        await self._killed(struck, "scheduler", pid, died)
        return struck if stopped and died else None

    async def _kill_supervisor(self) -> Strike | None:
        """Everything goes with it; `hive up` goes on where the log stands. What counts is from that on."""
        hit = kill(self._processes.state()["supervisor_pid"])
        struck = Strike("kill supervisor", time.time())
        await self._up_again(struck)
        return struck if hit else None

    async def _up_again(self, struck: Strike) -> None:
        await asyncio.to_thread(self._installation.up, executors=self._target.executors)
        struck.ready_at = time.time()
        # What it takes until a job is done is measured without the proxies: for them, processes start anew.
        await self._target.progress.job_done()
        await self._wires.lay()

    # --- SIGSTOP, slow disks -------------------------------------------------------------------------------

    async def _freeze_executor(self) -> Strike | None:
        return await self._freeze(self._rng.choice(self._processes.executors()), PAST_LEASE_S, "freeze executor")

    async def _freeze(self, name: str, seconds: float, kind: str = "") -> Strike | None:
        pid = self._processes.pid(name)
        frozen = [] if pid is None else family(pid)
        hit = signal_all(frozen, signal.SIGSTOP)
        try:
            await asyncio.sleep(seconds)
        finally:
            signal_all(frozen, signal.SIGCONT)
        struck = Strike(kind or f"freeze {name}", time.time(), executor=self._processes.executor_id(name))
        struck.ready_at = await self._processes.all_ready({})
        return struck if hit else None

    async def _slow_sync(self) -> Strike | None:
        pid, delayed = self._processes.pid("postgres"), 0
        if pid is not None:
            # Another fault of this moment may have killed it.
            with suppress(psutil.NoSuchProcess):
                slow = await asyncio.to_thread(SlowSync, pid, self._rng.randint(50, 300))
                try:
                    await asyncio.sleep(4)
                    delayed = slow.delayed()
                finally:
                    await asyncio.to_thread(slow.remove)
        return await self._passed("slow fsync", delayed > 0)

    # --- connections ---------------------------------------------------------------------------------------

    async def _cut_executors(self) -> Strike | None:
        return await self._passed("cut executors", self._wires.nats.cut_all() > 0)

    async def _cut_database(self) -> Strike | None:
        return await self._passed("cut database", self._wires.database.cut_all() > 0)

    async def _cut_commit(self) -> Strike | None:
        """The scheduler's next statement never reaches the database."""
        return await self._cut_at("cut commit", self._wires.database.cut_next_request())

    async def _cut_answer(self) -> Strike | None:
        """The database does what the scheduler's next statement says; the answer is lost."""
        cut = self._wires.database.cut_next_answer(POSTGRES_READY)
        return await self._cut_at("cut answer to commit", cut)

    async def _cut_at(self, kind: str, cut: asyncio.Event) -> Strike | None:
        with suppress(TimeoutError):
            async with asyncio.timeout(CUT_S):
                await cut.wait()
        self._wires.database.spare_answers()
        return await self._passed(kind, cut.is_set())

    async def _silent_network(self) -> Strike | None:
        before = self._wires.nats.held
        self._wires.nats.pause()
        try:
            await asyncio.sleep(PAST_LEASE_S)
        finally:
            self._wires.nats.resume()
        return await self._passed("silent network", self._wires.nats.held > before)

    async def _passed(self, kind: str, hit: bool) -> Strike | None:
        struck = Strike(kind, time.time())
        struck.ready_at = await self._processes.all_ready({})
        return struck if hit else None

    async def _delete_nats_store(self) -> Strike | None:
        store, kind = self._installation.home / "data" / "nats", "nats store deleted"
        pid = self._processes.pid("nats")
        struck = Strike(kind, time.time())
        hit = pid is not None and any(store.iterdir()) and signal_all(family(pid), signal.SIGSTOP)
        if hit:
            await asyncio.to_thread(shutil.rmtree, store, ignore_errors=True)
            store.mkdir(exist_ok=True)
            struck.at = time.time()
            hit = kill(pid)
        return await self._killed(struck, "nats", pid, hit)


def _refuses(folder: Path) -> bool:
    """Say whether nothing can be written there any more."""
    try:
        (folder / "written-after-the-cut").write_text("")
    except OSError:
        return True
    return False


def _is_backend_of(process: psutil.Process, user: str) -> bool:
    with suppress(psutil.Error):
        return f"postgres: {user} " in " ".join(process.cmdline())
    return False
