"""What goes wrong, and when: drawn from the seed."""

import random
from typing import TYPE_CHECKING, Any

import msgspec
from hive_common.contracts import events, values
from hive_common.contracts.events import TaskSucceeded
from hive_common.contracts.messages import AttemptReport, ReportRequest
from hive_common.eventlog.batch import Prepared, Salts
from hive_common.eventlog.log import Append, NewEvent
from hive_common.testing.memory_log import EndedTwice

from .loop import Process
from .network import CALM, WEATHERS

if TYPE_CHECKING:
    from .world import World

KINDS = (
    "kill scheduler",
    "kill scheduler",
    "stop scheduler",
    "cut scheduler from nats",
    "cut scheduler from postgres",
    "lose an answer",
    "kill executor",
    "kill executor",
    "stop executor",
    "cut executor",
    "set a clock",
    "weather",
    "forge a report",
    "forge a report",
    "write twice",
)


class Faults:
    """Strikes a world until it is over."""

    def __init__(self, world: "World", rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self._over = False
        self._salts = Salts()

    def plan(self, count: int, until_s: float) -> None:
        """Draw strikes."""
        loop = self._world.loop
        for _ in range(count):
            kind = self._rng.choice(KINDS)
            loop.call_at(self._rng.uniform(0.5, until_s), self._strike, kind, context=loop.world)

    def stop(self) -> None:
        """Nothing more goes wrong."""
        self._over = True
        self._world.bus.weather = CALM
        self._world.server.answers_lost = self._world.server.requests_lost = 0.0

    def _strike(self, kind: str) -> None:
        if not self._over:
            getattr(self, "_" + kind.replace(" ", "_"))()

    def _later(self, after_s: float, call: Any, *args: Any) -> None:
        self._world.loop.call_later(after_s, call, *args, context=self._world.loop.world)

    def _scheduler(self) -> Any:
        """Return one of them, preferably the one that leads."""
        leading = [node for node in self._world.schedulers if node.leader is not None]
        return self._rng.choice(leading if leading and self._rng.random() < 0.8 else self._world.schedulers)

    def _kill_scheduler(self) -> None:
        drawn = self._rng.random()
        self._scheduler().crash(power=drawn < 0.3)
        if drawn < 0.15:
            self._world.server.on_lock = self._lose_power

    def _lose_power(self, process: Process) -> None:
        """Let the one that has just got the lock vanish before it can say anything more."""
        for node in self._world.schedulers:
            if node.process is process and not self._over:
                node.crash(power=True)

    def _stop_scheduler(self) -> None:
        node, seconds = self._scheduler(), self._rng.choice((0.5, 2.0, 8.0, 15.0))
        process = node.process
        if process.alive and not process.stopped:
            self._world.trace(node.name, f"stands still for {seconds} s")
            process.stop()
            self._later(seconds, process.resume)

    def _cut_scheduler_from_nats(self) -> None:
        self._cut(self._scheduler(), self._rng.choice((1.0, 5.0, 12.0)))

    def _cut_scheduler_from_postgres(self) -> None:
        node, seconds = self._scheduler(), self._rng.choice((0.5, 5.0, 9.0, 14.0))
        self._world.trace(node.name, f"is cut from the database for {seconds} s")
        node.wire.cut_until_s = self._world.loop.time() + seconds

    def _lose_an_answer(self) -> None:
        server, lost = self._world.server, self._rng.choice(("answers_lost", "requests_lost"))
        self._world.trace("database", f"{lost}: the next one")
        setattr(server, lost, 1.0)

        def enough() -> None:
            setattr(server, lost, 0.0)

        self._later(self._rng.uniform(0.05, 0.3), enough)

    def _executor(self) -> Any:
        return self._rng.choice(self._world.executors)

    def _kill_executor(self) -> None:
        self._executor().crash(self._rng.choice((0.1, 0.5, 2.0, 20.0)))

    def _stop_executor(self) -> None:
        node, seconds = self._executor(), self._rng.choice((1.0, 4.0, 10.0, 25.0))
        process = node.process
        if process.alive and not process.stopped:
            self._world.trace(node.name, f"stands still for {seconds} s")
            process.stop()
            self._later(seconds, process.resume)

    def _cut_executor(self) -> None:
        self._cut(self._executor(), self._rng.choice((1.0, 5.0, 10.0, 40.0)))

    def _cut(self, node: Any, seconds: float) -> None:
        client = node.client
        if not client.cut and client.process.alive:
            self._world.trace(node.name, f"is cut from the network for {seconds} s")
            self._world.bus.cut(client, self._rng.choice((0.001, 4.0)))
            self._later(seconds, self._world.bus.heal, client)

    def _set_a_clock(self) -> None:
        node, seconds = self._scheduler(), self._rng.choice((-3600.0, -5.0, 5.0, 3600.0))
        self._world.trace(node.name, f"its clock is set by {seconds:+} s")
        self._world.oracle.clocks_are_true = False
        node.clock.offset_us += int(seconds * 1e6)

    def _weather(self) -> None:
        self._world.bus.weather = self._rng.choice(WEATHERS)
        self._world.trace("network", str(self._world.bus.weather))

    def _forge_a_report(self) -> None:
        """Let an executor claim what it never did: an attempt of another one, or of another session."""
        node = self._executor()
        live = [
            (task_id, number, attempt)
            for task_id, task in self._world.oracle.tasks.items()
            for number, attempt in task.attempts.items()
            if attempt.status == "live" or self._rng.random() < 0.1
        ]
        if not live or not node.process.alive:
            return
        task, number, attempt = self._rng.choice(live)
        session = self._rng.choice((attempt.session, "another"))
        if (attempt.executor, attempt.session) == (node.id, session):
            return
        self._world.trace(node.name, f"claims attempt {number} of {task[-6:]} as {session}")
        # What could be a result, or a verdict of any kind.
        said = {"n": 1, "items": [], "score": 1.0, "passed": True, "equal": True, "choice": 0, "forged": True}
        output = values.inline(msgspec.json.encode(said))
        report = AttemptReport(task, number, session, "succeeded", output=output)
        node.process.spawn(node.ask(ReportRequest(session=session, reports=(report,))))

    def _write_twice(self) -> None:
        """Let somebody who may write, and does not know the rules, end a task that has ended once more."""
        log = self._world.server.log
        ended = [stream for stream, task in self._world.oracle.tasks.items() if task.status == "succeeded"]
        if not ended:
            return
        stream = self._rng.choice(ended)
        event = NewEvent(
            stream, log.version(stream) + 1, "TaskSucceeded", 1, events.encode(TaskSucceeded(1)), 1, "x", "x"
        )
        try:
            log.log_append([Prepared(log.log_id, Append((event,)), self._salts)])
        except EndedTwice:
            self._world.trace("somebody", f"may not end {stream[-6:]} twice")
