"""Builds an executor from its configuration and runs it until it is told to stop."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

from hive_common.contracts.events import Capabilities
from hive_common.contracts.messages import Assignment
from hive_common.control.orders import Stopped, in_words
from hive_common.kernel.clock import Clock, SystemClock
from hive_common.kernel.ids import new_id
from hive_common.ops.lifecycle import Stop
from hive_common.ops.telemetry import Health, OpsServer

from hive_executor.agents import Agents
from hive_executor.attempts import Attempts
from hive_executor.blobs import BlobClient, FolderCache
from hive_executor.capabilities import Device
from hive_executor.config import ExecutorConfig
from hive_executor.gate import Gate, Prefetch
from hive_executor.gateway import Gateway
from hive_executor.greeter import Greeter
from hive_executor.host import Means
from hive_executor.host.addresses import SystemResolver
from hive_executor.host.approval import SchedulerApprover
from hive_executor.host.http import HttpClient
from hive_executor.host.kv import RegistryKv
from hive_executor.identity import Identity, Renewal
from hive_executor.inference.service import DeviceModels
from hive_executor.kill import KillSwitch
from hive_executor.link import Link
from hive_executor.live_log import LiveLogs
from hive_executor.lock import FolderLock
from hive_executor.metrics import SANDBOX_LAYERS, SLOTS
from hive_executor.permits import Permits
from hive_executor.pulls import Lease, Pulls
from hive_executor.reporter import Reporter
from hive_executor.sandbox import RunnerPool, prepare_python_runtime
from hive_executor.sandbox.confine import EMPTY_ROOT, LAYERS
from hive_executor.signers import Signers
from hive_executor.spool import Spool

log = logging.getLogger(__name__)

SUPERSEDED_EXIT_CODE: Final = 3
REVOKED_EXIT_CODE: Final = 4
GREETING_S_MAX: Final = 5.0
"""A registry that is away must not keep an executor, which the scheduler may know already, from working."""
FLUSH_S_MAX: Final = 3.0
_LEASE_CHECK_S: Final = 0.5


class Executor:
    """Everything that one executor process consists of."""

    def __init__(self, config: ExecutorConfig, stop: Stop, clock: Clock) -> None:
        self._config = config
        self._stop = stop
        self._phase = "is being set up"
        self._is_superseded = False
        self._is_revoked = False
        state, cache = Path(config.state_dir), Path(config.cache_dir)
        self._identity = Identity(config.executor_id, config.nats.credentials_file, clock)
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._cache = cache
        session = new_id()
        self._session = session
        self._device = Device(
            slots=config.slots,
            memory_bytes=config.memory_bytes,
            labels=dict(config.labels),
            device=config.device,
            tier=config.tier,
        )
        slots = self._device.slots
        self._lock = FolderLock(state)
        self._spool = Spool(state / "spool", reports_max=config.spool_reports_max, bytes_max=config.spool_bytes_max)
        self._pool = RunnerPool(
            size=slots, cache_dir=cache, log_sink=lambda text: log.warning("runner pool: %s", text)
        )
        self._link = Link(config.executor_id)
        self._kill = KillSwitch(config.executor_id, config.kill_public_key, state, self._obey)
        self._signers = Signers(state, self._signers_changed, lambda: self._greeter.again())
        self._greeter = Greeter(
            self._link,
            name=config.name,
            session=session,
            look=self._look,
            interval_ms=config.report_interval_ms,
            on_refused=lambda: self._renewal.soon(),
            on_order=self._kill.told,
            on_signers=self._signers.told,
        )
        self._gateway = Gateway(
            lambda: config.blobs_url or self._greeter.blobs_url, self._identity.header, config.nats.ca_file
        )
        self._renewal = Renewal(self._identity, self._gateway, lambda: self._link.is_connected, self._revoked)
        self._blobs = BlobClient(
            self._gateway,
            FolderCache(cache / "blobs", config.cache_bytes_max // 2),
            config.blob_timeout_ms,
        )
        self._agents = Agents(
            self._blobs, FolderCache(cache / "modules", config.cache_bytes_max // 2), cache, self._signers
        )
        self._resolver = SystemResolver()
        self._models = DeviceModels(config, self._link, self._blobs.store)
        self._live_logs = LiveLogs(self._link)
        self._attempts = Attempts(
            session=session,
            agents=self._agents,
            blobs=self._blobs,
            pool=self._pool,
            spool=self._spool,
            live_logs=self._live_logs,
            gate=Gate(slots, self._device.memory_bytes),
            prefetch=Prefetch(slots, config.prefetch_max, config.prefetch_ms),
            memory_bytes=self._device.memory_bytes,
            clock=clock,
            on_change=self._changed,
            on_started=lambda report: self._reporter.started(report),
            on_progress=lambda report: self._reporter.progress(report),
            stopped=self._stopped_by,
            means=Means(
                self._models.completer,
                HttpClient(self._resolver),
                RegistryKv(self._link),
                SchedulerApprover(self._link),
            ),
            permits=Permits(config.executor_id, self._identity.public_key, config.token_public_key, clock),
        )
        self._reporter = Reporter(
            self._link,
            self._spool,
            session,
            is_busy=lambda: self._attempts.is_busy,
            on_change=lambda: self._pulls.poke(),
            on_late=self._attempts.discard,
        )
        self._link.on_reset(self._attempts.tell_progress)
        self._lease = Lease(clock)
        self._pulls = Pulls(
            self._link,
            session=session,
            attempts=self._attempts,
            spool=self._spool,
            lease=self._lease,
            clock=clock,
            kill=self._kill,
            signers=self._signers,
            is_paused=self._is_paused,
            greet=self._greeter.again,
            on_refused=self._renewal.soon,
            on_superseded=self._superseded,
        )
        self._ops = OpsServer(self._health(), config.ops_host, config.ops_port)
        SLOTS.set(slots)

    async def run(self) -> None:
        """Work until `stop` is set, then give back what is not done, and close everything."""
        async with AsyncExitStack() as stack:
            await self._ops.start()
            stack.push_async_callback(self._ops.stop)
            await self._lock.acquire()
            stack.callback(self._lock.release)
            await asyncio.to_thread(self._spool.open)
            self._kill.load()
            self._signers.load()
            stack.push_async_callback(self._spool.close)
            stack.push_async_callback(self._gateway.close)
            stack.push_async_callback(self._blobs.close)
            renewing = await stack.enter_async_context(_Background(self._stop))
            # From here on: what there is may have run out, and NATS would not take it.
            renewing.start("renewal of credentials", self._renewal.run())
            stack.push_async_callback(self._agents.close)
            stack.callback(self._resolver.close)
            # Models of this device answer its programs whatever is away.
            await self._models.open()
            stack.push_async_callback(self._models.close)
            watching = await stack.enter_async_context(_Background(self._stop))
            self._models.run(watching.start, self._greeter.look_again)
            if not await self._unless_stopped(self._start_pool()):
                return
            stack.push_async_callback(self._pool.close)
            self._phase = "waits for NATS"
            stack.push_async_callback(self._link.close)
            if not await self._unless_stopped(self._link.open(self._config.nats)):
                return
            await self._kill.open(self._link)
            await self._models.connect()
            stack.push_async_callback(self._models.disconnect)
            async with _Background(self._stop) as background:
                background.start("spool", self._spool.run())
                background.start("kill orders", self._kill.run())
                background.start("reporter", self._reporter.run())
                background.start("greeter", self._greeter.run())
                background.start("live logs", self._live_logs.run())
                background.start("lease watch", self._watch_lease())
                if await self._unless_stopped(self._before_the_first_pull()):
                    self._phase = ""
                    background.start("pulls", self._pulls.run())
                    log.info("session %s with %d slots", self._session, self._device.slots)
                    await self._stop.wait()
                await self._finish()

    async def _start_pool(self) -> None:
        self._phase = "prepares the Python runtime"
        await prepare_python_runtime(self._cache, lambda text: log.info("%s", text))
        self._phase = "starts its runners"
        await self._pool.start()
        layers = self._pool.stats()["layers"]
        for layer in LAYERS:
            SANDBOX_LAYERS.labels(layer=layer).set(layer in layers)
        self._device.sandbox = ", ".join(layers) or "engine only"
        self._device.has_scratch = EMPTY_ROOT in layers
        if missing := [layer for layer in LAYERS if layer not in layers]:
            log.warning("around the engine: %s; this system gives runners no %s", self._device.sandbox, missing)

    async def _before_the_first_pull(self) -> None:
        """Say hello, and report what an earlier session left: its attempts would otherwise be made lost."""
        self._phase = "says hello"
        try:
            async with asyncio.timeout(GREETING_S_MAX):
                await self._greeter.greeted.wait()
        except TimeoutError:
            log.warning("the registry does not answer; going on without it")
        self._phase = f"reports {len(self._spool)} outcomes of an earlier session"
        self._reporter.wake()
        while self._spool.holds_other_session(self._session) and not self._reporter.was_refused:
            await asyncio.sleep(0.01)

    async def _finish(self) -> None:
        if self._is_superseded or self._is_revoked:
            self._attempts.discard_all()
            return
        self._phase = "stops"
        self._pulls.stop_taking()
        await self._attempts.close(self._config.stop_grace_ms / 1000)
        try:
            async with asyncio.timeout(FLUSH_S_MAX):
                await self._reporter.flushed()
        except TimeoutError:
            log.warning("%d outcomes stay in the spool for the next start", len(self._spool))

    async def _unless_stopped(self, work: Coroutine[Any, Any, None]) -> bool:
        """Await `work`; return False when the process is told to stop first."""
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                await working
                return True
            return False
        finally:
            await _cancelled(working)
            await _cancelled(stopping)

    async def _watch_lease(self) -> None:
        """Have guests stand still without a lease, and kill those that nobody can be waiting for (law 9)."""
        while True:
            if self._lease.is_valid:
                self._pool.resume()
            else:
                self._pool.pause()
            await self._lease.ends_or_returns(_LEASE_CHECK_S)
            if self._lease.age_ms > self._config.offline_stop_ms and self._attempts.keys:
                log.warning("no lease for %d ms: giving back what runs", self._lease.age_ms)
                self._attempts.give_back(f"no lease could be renewed for {self._config.offline_stop_ms} ms")

    def _stopped_by(self, assignment: Assignment) -> str | None:
        agent = assignment.agent
        return self._kill.stopped.attempt(self._config.executor_id, agent.name, agent.version, assignment.job)

    def _signers_changed(self) -> None:
        self._attempts.end_untrusted(self._signers.trusts)

    def _obey(self, _: Stopped) -> None:
        self._attempts.kill_stopped()
        entry = self._kill.stops_device
        self._models.refuse(f"a kill order stops {in_words(entry)}" if entry else "")
        self._pulls.poke()

    async def _look(self) -> Capabilities:
        return await self._device.capabilities(self._models.found)

    def _changed(self) -> None:
        self._reporter.wake()
        self._pulls.poke()

    def _is_paused(self) -> bool:
        power = self._greeter.power
        if power.battery_percent is None or power.charging:
            return False
        return power.battery_percent <= self._config.battery_floor_percent

    def _superseded(self) -> None:
        self._is_superseded = True
        self._stop.set(
            f"another process works as executor {self._config.executor_id}: this one was superseded",
            SUPERSEDED_EXIT_CODE,
        )

    def _revoked(self) -> None:
        self._is_revoked = True
        self._stop.set(
            f"executor {self._config.executor_id} was revoked, for ever; to come back, this machine joins anew",
            REVOKED_EXIT_CODE,
        )

    def _health(self) -> Health:
        health = Health()
        health.add("phase", lambda: f"the executor {self._phase}" if self._phase else None)
        health.add("nats", lambda: None if self._link.is_connected else "not connected to NATS")
        health.add("credentials", self._credentials_problem)
        health.add("lease", lambda: None if self._lease.is_valid else "the lease has run out")
        health.add("runners", self._runner_problem)
        health.add("spool", self._spool_problem)
        health.add("models", lambda: self._models.problem())
        return health

    def _credentials_problem(self) -> str | None:
        if self._identity.left_s > 0:
            return None
        return f"the credentials for NATS have run out: {self._renewal.problem or 'being renewed'}"

    def _runner_problem(self) -> str | None:
        return None if self._pool.stats()["pids"] else "no runner is up"

    def _spool_problem(self) -> str | None:
        if self._spool.problem is not None:
            return self._spool.problem
        if self._spool.room == 0:
            return f"the spool is full: {len(self._spool)} outcomes wait to be committed; not pulling"
        return None


class _Background:
    """Tasks that live as long as the block, and end the process when they fail."""

    def __init__(self, stop: Stop) -> None:
        self._stop = stop
        self._tasks: list[asyncio.Task[None]] = []

    def start(self, name: str, work: Coroutine[Any, Any, None]) -> None:
        """Start a task."""
        task = asyncio.create_task(work, name=name)
        self._stop.guard(task)
        self._tasks.append(task)

    async def __aenter__(self) -> "_Background":
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in reversed(self._tasks):
            await _cancelled(task)


async def _cancelled(task: "asyncio.Task[Any]") -> None:
    task.cancel()
    await asyncio.wait({task})


async def main(config: ExecutorConfig, stop: Stop) -> None:
    """Run an executor until `stop` is set.

    Raises:
        InvalidArgument: a file with a secret cannot be used.
        FailedPrecondition: another process uses the state folder, or the Python runtime cannot be built.
    """
    executor = Executor(config, stop, SystemClock())
    await executor.run()
