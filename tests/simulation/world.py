"""One world from one seed: built, struck, healed, run to its end, and checked."""

import contextlib
import gc
import logging
import os
import random
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import psycopg
from hive_audit.verifier import Verifier
from hive_common.contracts.limits import CHUNK_EVENTS_MAX
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import NotFound, Unavailable
from hive_common.testing.memory_log import MemoryReader
from hive_scheduler import engine
from hive_scheduler.domain.job import snapshot
from hive_scheduler.recovery import replay
from hive_scheduler.submission import Specs

from .clients import Client
from .database import Server
from .executor import ExecutorNode
from .faults import Faults
from .jobs import Plans, Registry, draft
from .judged import Fleet
from .loop import Stuck, VirtualLoop
from .network import CALM, WEATHERS, Bus
from .oracle import Oracle
from .scheduler import SchedulerNode

STRIKES_S = 40.0
END_S = 1800.0
LOOK_S = 1.0
CHUNKS = (1, 20, CHUNK_EVENTS_MAX)
"""Events after which a job has to wait for the others: few, so that it happens to small jobs."""


class Shape(NamedTuple):
    """How large a world is, and how bad. None: drawn from the seed."""

    schedulers: int | None = None
    executors: int | None = None
    jobs: int | None = None
    strikes: int | None = None


DRAWN = Shape()


class Outcome(NamedTuple):
    """What came of a seed.

    Attributes:
        digest: of the log's last event, and so of all of it.
        virtual_s: how long it took in its own time.
    """

    seed: int
    problems: list[str]
    virtual_s: float
    cpu_s: float
    events: int
    messages: int
    digest: str
    counts: dict[str, int]


class Blobs:
    """An artifact store in memory."""

    def __init__(self) -> None:
        self._blobs: dict[str, bytes] = {}

    async def get(self, digest: str) -> bytes:
        """Return a blob."""
        if digest not in self._blobs:
            raise NotFound(digest)
        return self._blobs[digest]

    async def size(self, digest: str) -> int:
        """Return its size."""
        return len(await self.get(digest))

    async def put(self, data: bytes) -> str:
        """Keep one."""
        digest = digest_of(data)
        self._blobs[digest] = data
        return digest


class World:
    """Everything there is."""

    def __init__(self, seed: int, shape: Shape, lines: Callable[[str], None] | None = None) -> None:
        self._lines = lines
        rng = random.Random(seed)

        def branch() -> random.Random:
            return random.Random(rng.getrandbits(64))

        self.loop = VirtualLoop()
        self.bus = Bus(self.loop, branch())
        self.server = Server(self.loop, branch())
        self.oracle = Oracle(self.server, self.trace)
        self.store = Blobs()
        self.plans = Plans(rng.choice((0.0, 0.05, 0.3)))
        self.bus.watch = self._watch
        self.bus.weather = rng.choice(WEATHERS)
        self.server.views_delay_s = rng.choice((0.0, 0.5, 5.0))
        registry = Registry(self.server.log)
        registry.publish()
        count = rng.choice((1, 2, 2)) if shape.schedulers is None else shape.schedulers
        self.schedulers = [SchedulerNode(self, f"scheduler-{n}", branch()) for n in range(count)]
        count = rng.randint(1, 6) if shape.executors is None else shape.executors
        self.executors = []
        devices = 0
        for number in range(count):
            name, slots = f"executor-{number}", rng.randint(1, 4)
            devices += devices == 0 or rng.random() < 0.8
            lies = rng.choice((0.0, 0.0, 0.0, 0.3, 1.0))
            executor = registry.register(name, slots, f"device-{devices}")
            self.executors.append(ExecutorNode(self, executor, name, slots, lies, branch()))
        fleet = Fleet(count, devices)
        self.client = Client(self, branch())
        jobs_rng = branch()
        count = jobs_rng.randint(1, 8) if shape.jobs is None else shape.jobs
        for number in range(count):
            self.client.plan(jobs_rng.uniform(0.1, STRIKES_S * 0.8), draft(number, fleet, jobs_rng))
        self.faults = Faults(self, branch())
        self._calm = shape.strikes == 0
        if self._calm:
            self.bus.weather = CALM
        else:
            self.faults.plan(rng.choice((0, 2, 6, 15)) if shape.strikes is None else shape.strikes, STRIKES_S)

    def trace(self, who: str, what: str) -> None:
        """Write down what happens."""
        if self._lines is not None:
            self._lines(f"{self.loop.time():10.4f}  {who:<12}  {what}")

    def _watch(self, way: str, subject: str, message: Any) -> None:
        if subject.endswith(".pull"):
            self.oracle.heard_s[subject.split(".")[2]] = self.loop.time()
        if self._lines is not None:
            self.trace("network", f"{way}  {subject}  {message.data[:300].decode(errors='replace')}")

    def silence(self) -> None:
        """Say nothing more: it is over."""
        self._lines = None

    def run(self) -> None:
        """Let it begin, go wrong, heal and end."""
        for node in (*self.schedulers, *self.executors):
            self.loop.call_soon(node.start, context=self.loop.world)
        self.loop.call_later(LOOK_S, self._look, context=self.loop.world)
        if not self._calm:
            self.loop.call_at(STRIKES_S, self._heal, context=self.loop.world)
        self.loop.call_at(END_S, self.loop.stop, context=self.loop.world)
        try:
            self.loop.run_forever()
        except Stuck as error:
            self.oracle.found(str(error))
        self._check_end()

    def _heal(self) -> None:
        self.trace("world", "heals")
        self.faults.stop()

    def _look(self) -> None:
        """Check what must hold at any time, and whether all is done."""
        self.oracle.check_guests(self.executors)
        if self.oracle.problems or self._done():
            self.loop.stop()
            return
        if int(self.loop.time()) % 16 == 0:
            self._check_replay()
        self.loop.call_later(LOOK_S, self._look, context=self.loop.world)

    def _done(self) -> bool:
        return (
            self.client.waiting == 0
            and self.loop.time() > STRIKES_S * (not self._calm)
            and all(job.end for job in self.oracle.jobs.values())
            and all(node.process.alive and not node.spool and not node.held for node in self.executors)
            and any(node.leader is not None and _is_idle(node) for node in self.schedulers)
        )

    def _check_end(self) -> None:
        oracle = self.oracle
        for context in self.loop.failures:
            oracle.found(f"nobody caught {context.get('exception') or context.get('message')!r}")
        if not oracle.problems and not self._done():
            left = [job[-6:] for job, state in oracle.jobs.items() if not state.end]
            held = {node.name: (len(node.held), len(node.spool)) for node in self.executors}
            oracle.found(f"after {END_S / 60:.0f} min not done: jobs {left}, held and spooled {held}")
        for job in self.client.submitted:
            if job not in oracle.jobs:
                oracle.found(f"job {job[-6:]} was acknowledged, and is not in the log")
        verifier = Verifier()
        verifier.feed(self.server.log.rows)
        result = verifier.finish()
        if not result.ok:
            oracle.found(f"the log does not verify: {result.reason}")
        self._check_replay()

    def _check_replay(self) -> None:
        """Compare what a leader that waits for nothing has in memory with a replay of the log."""
        for node in self.schedulers:
            if node.leader is None or not node.process.alive or not _is_idle(node):
                continue
            if self.server.holder is None or self.server.holder.process is not node.process:
                continue
            fold, _ = _now(replay(MemoryReader(self.server.log), Specs(), node.clock.now_us()))
            live = {job_id: _state(job) for job_id, job in node.leader.engine.jobs.items()}
            replayed = {job_id: _state(job) for job_id, job in fold.jobs.items()}
            if live != replayed:
                self.oracle.found(f"{node.name}: a replay of the log gives another state than it has")
                self.trace("ORACLE", f"live {live}\nreplayed {replayed}")


def _state(job: Any) -> Any:
    found = snapshot(job)
    for task in found["tasks"].values():
        # Planned times move with a clock that is set, and with the clock of a new leader.
        task.pop("not_before_us", None)
        if task.get("judged"):
            task["judged"]["waits"] = len(task["judged"].get("waits", ()))
    return found


def _is_idle(node: SchedulerNode) -> bool:
    assert node.leader is not None
    committer = node.leader.engine.committer
    return not committer._open.groups and committer._flying is None


def _now(work: Any) -> Any:
    """Run a coroutine that waits for nothing."""
    try:
        work.send(None)
    except StopIteration as done:
        return done.value
    raise AssertionError("it waits")


class _Findings(logging.Handler):
    """Takes what the scheduler logs as a defect."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.ERROR)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        """Note an exception that no part of it expects."""
        error = record.exc_info[1] if record.exc_info else None
        if error is not None and not _is_expected(error):
            self._world.oracle.found(f"{record.getMessage()}: {error!r}")


def _is_expected(error: BaseException) -> bool:
    return isinstance(error, psycopg.OperationalError | Unavailable)


def run_seed(seed: int, shape: Shape = DRAWN, lines: Callable[[str], None] | None = None) -> Outcome:
    """Run one world."""
    begun = time.process_time()
    rng = random.Random(f"bytes of {seed}")
    chunk = rng.choice(CHUNKS)
    chunks = mock.patch.object(engine, "CHUNK_EVENTS_MAX", chunk)
    with mock.patch.object(os, "urandom", rng.randbytes), chunks, _quiet():
        world = World(seed, shape, lines)
        handler = _Findings(world)
        logger = logging.getLogger()
        logger.addHandler(handler)
        try:
            world.run()
            log = world.server.log
            return Outcome(
                seed,
                list(world.oracle.problems),
                world.loop.time(),
                time.process_time() - begun,
                log.head,
                world.bus.sent,
                log.rows[-1][5].hex(),
                dict(world.oracle.counts),
            )
        finally:
            logger.removeHandler(handler)
            for node in (*world.schedulers, *world.executors):
                node.process.kill()
            world.silence()
            logging.disable()
            world.loop.close()
            del world
            gc.collect()
            logging.disable(logging.NOTSET)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Let killed processes be forgotten without a word: their coroutines never ended."""
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    level = logging.getLogger().level
    was_enabled = gc.isenabled()
    gc.disable()  # when it runs is not decided by the seed
    logging.getLogger().setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            yield
    finally:
        logging.getLogger().setLevel(level)
        if was_enabled:
            gc.enable()
        sys.unraisablehook = hook
