"""A made-up executor: the protocol's other side, with a spool that survives it, and guests that are only timers."""

import asyncio
import random
from typing import TYPE_CHECKING, Any

import msgspec
from hive_common.contracts import values
from hive_common.contracts.messages import (
    LEADER_SUBJECT,
    Assignment,
    AttemptKey,
    AttemptReport,
    PullReply,
    PullRequest,
    ReportReply,
    ReportRequest,
    inbox_prefix,
    pull_subject,
    report_subject,
)

from .judged import MAKERS
from .loop import Process
from .network import NO_RESPONDERS, Client, Message

if TYPE_CHECKING:
    from .world import World

PULL_TIMEOUT_S = 2.5
ANSWER_S = 5.0
STARTED_AFTER_S = 0.5
OFFLINE_STOP_S = 30.0
BACKOFF_S = 0.05
BACKOFF_MAX_S = 1.0

_pull_reply = msgspec.json.Decoder(PullReply).decode
_report_reply = msgspec.json.Decoder(ReportReply).decode
_encode = msgspec.json.Encoder().encode

Key = tuple[str, int]


class Run:
    """An attempt that this executor holds. `at_work`: its guest gets time now."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.key: Key = (assignment.task, assignment.attempt)
        self.at_work = False
        self.done_permille = 0
        self.task: asyncio.Task[None] | None = None


class ExecutorNode:
    """One executor.

    Attributes:
        lies: the share of its results that are wrong.
        spool: outcomes that are not answered yet, on disk.
        held: attempts of this session that have not ended.
    """

    def __init__(
        self, world: "World", executor: str, name: str, slots: int, lies: float, rng: random.Random
    ) -> None:
        self._world = world
        self._rng = rng
        self.id = executor
        self.name = name
        self.slots = slots
        self.lies = lies
        self.spool: dict[Key, AttemptReport] = {}
        self._generation = 0
        self.process: Process
        self.client: Client

    def start(self) -> None:
        """Start the process: a new session, and the spool as it was."""
        world = self._world
        self._generation += 1
        self.process = Process(world.loop, f"{self.name}.{self._generation}")
        self.client = world.bus.client(self.process)
        self.session = f"{self.name}-{self._generation}"
        self.held: dict[Key, Run] = {}
        self._seen: set[Key] = set()
        self._started: dict[Key, AttemptReport] = {}
        self._marks: dict[Key, AttemptReport] = {}
        self._sequence = 0
        self._answered = 0
        self._failed = False
        self._reset = False
        self._epoch = 0
        self._sent: dict[int, float] = {}
        self._lease_until_s = 0.0
        self._renewed_s = world.loop.time()
        self._answers: dict[str, asyncio.Future[bytes]] = {}
        self.process.spawn(self._main())

    def crash(self, pause_s: float) -> None:
        """Kill it, and start it again."""
        if self.process.alive:
            self._world.trace(self.name, "is killed")
            self._end(pause_s)

    def _end(self, pause_s: float) -> None:
        self.process.kill()
        self._world.bus.drop(self.client)
        self.held = {}
        self._world.loop.call_later(pause_s, self.start, context=self._world.loop.world)

    async def _main(self) -> None:
        self._poke, self._wake = asyncio.Event(), asyncio.Event()
        self._renewed = asyncio.Event()
        self._wake.set()
        self._inbox = f"{inbox_prefix(self.id)}.{self.session}"
        await self.client.subscribe(f"{self._inbox}.*", cb=self._receive)
        await self.client.subscribe(f"{self._inbox}.report.*", cb=self._receive_report)
        await self.client.subscribe(LEADER_SUBJECT, cb=self._on_leader)
        for work in (self._pulls(), self._reports(), self._watch_lease()):
            self.process.spawn(work)

    def _on_leader(self, _: Message) -> None:
        self._reset = True
        for run in self.held.values():
            if run.done_permille:
                self._say_done(run, run.done_permille)
        self._poke.set()
        self._wake.set()

    # --- pulls (hive_executor.pulls) ---

    @property
    def has_lease(self) -> bool:
        """Whether the control plane counts on this executor."""
        return self._world.loop.time() < self._lease_until_s

    def _slots_free(self) -> int:
        return max(0, self.slots - len(self.held))

    async def _pulls(self) -> None:
        backoff_s = BACKOFF_S
        while True:
            slots_free = await self._pull()
            if await self._answer(slots_free):
                backoff_s = BACKOFF_S
                continue
            await self._pause(self._rng.uniform(0.5, 1.0) * backoff_s)
            backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _pull(self) -> int:
        self._sequence += 1
        self._reset = self._failed = False
        self._poke.clear()
        slots_free = self._slots_free()
        self._sent[self._sequence] = self._world.loop.time()
        request = PullRequest(
            session=self.session,
            sequence=self._sequence,
            slots_free=slots_free,
            memory_free_bytes=8 << 30,
            held=tuple(AttemptKey(*key) for key in self.held),
            spooled=tuple(AttemptKey(*key) for key in self.spool),
        )
        await self.client.publish(pull_subject(self.id), _encode(request), reply=f"{self._inbox}.{self._sequence}")
        return slots_free

    async def _answer(self, slots_free: int) -> bool:
        loop = self._world.loop
        until_s = loop.time() + PULL_TIMEOUT_S
        while True:
            left_s = until_s - loop.time()
            if left_s <= 0 or not await _set(self._poke, left_s):
                return False
            self._poke.clear()
            if self._answered >= self._sequence:
                return not self._failed
            if self._reset or (slots_free == 0 and self._slots_free() > 0):
                return True

    async def _pause(self, wait_s: float) -> None:
        until_s = self._world.loop.time() + wait_s
        while not self._reset and (left_s := until_s - self._world.loop.time()) > 0:
            self._poke.clear()
            await _set(self._poke, left_s)

    def _receive(self, message: Message) -> None:
        sequence = int(message.subject.rpartition(".")[2])
        sent_s = self._sent.pop(sequence, None)
        if sent_s is None:
            return
        failed = message.headers == NO_RESPONDERS or not self._apply(_pull_reply(message.data), sent_s)
        if sequence > self._answered:
            self._answered, self._failed = sequence, failed
        self._poke.set()

    def _apply(self, reply: PullReply, sent_s: float) -> bool:
        if reply.superseded:
            self._world.trace(self.name, "is superseded")
            self._end(self._rng.uniform(0.1, 2.0))
            return False
        if reply.error is not None or reply.unknown or reply.epoch < self._epoch:
            return False
        self._epoch = reply.epoch
        self._lease_until_s = max(self._lease_until_s, sent_s + reply.lease_ms / 1e3)
        self._renewed_s = max(self._renewed_s, sent_s)
        self._renewed.set()
        for key in reply.cancel:
            self._discard((key.task, key.attempt))
        for assignment in reply.assignments:
            self._take(assignment)
        return True

    def _discard(self, key: Key) -> None:
        self._seen.add(key)
        run = self.held.pop(key, None)
        if run is not None:
            self._stop(run)

    def _stop(self, run: Run) -> None:
        run.at_work = False
        if run.task is not None:
            run.task.cancel()
        self._poke.set()

    def _take(self, assignment: Assignment) -> None:
        key = assignment.task, assignment.attempt
        self._world.oracle.given(self, assignment)
        if key in self.held or key in self._seen or key in self.spool:
            return
        self._seen.add(key)
        run = self.held[key] = Run(assignment)
        self._world.oracle.check_slots(self)
        run.task = self.process.spawn(self._attempt(run))

    # --- attempts (hive_executor.attempts) ---

    async def _attempt(self, run: Run) -> None:
        loop = self._world.loop
        plan = self._world.plans.of(run.assignment, self.lies, self._rng)
        self._world.oracle.runs(self, run.key)
        timer = loop.call_later(STARTED_AFTER_S, self._say_started, run)
        left_s = min(plan.takes_s, run.assignment.timeout_ms / 1e3)
        is_maker = run.assignment.agent.name in MAKERS
        while left_s > 0:
            if not self.has_lease:
                # A guest stands still without a lease.
                run.at_work = False
                self._renewed.clear()
                await self._renewed.wait()
                continue
            run.at_work = True
            says_s = left_s - 0.9 * plan.takes_s if is_maker and not run.done_permille else left_s
            step_s = max(min(left_s, says_s, self._lease_until_s - loop.time()), 1e-6)
            await asyncio.sleep(step_s)
            left_s -= step_s
            if is_maker and not run.done_permille and left_s <= 0.9 * plan.takes_s:
                self._say_done(run, 100)
        timer.cancel()
        if plan.silent:
            await asyncio.Event().wait()  # this one never says how it ended
        run.at_work = False
        timed_out = plan.takes_s > run.assignment.timeout_ms / 1e3
        code = "timeout" if timed_out else plan.code
        if code:
            self._spool(run, "failed", code=code)
        else:
            raw = _encode(plan.output)
            self._world.oracle.gave(self, run.key, raw)
            self._spool(run, "succeeded", output=values.inline(raw))

    def _say_started(self, run: Run) -> None:
        self._started[run.key] = self._report(run, "started")
        self._wake.set()

    def _say_done(self, run: Run, permille: int) -> None:
        run.done_permille = permille
        self._marks[run.key] = self._report(run, "started", done_permille=permille)
        self._wake.set()

    def _spool(self, run: Run, status: str, **fields: Any) -> None:
        self.spool[run.key] = self._report(run, status, **fields)
        self.held.pop(run.key, None)
        self._wake.set()
        self._poke.set()

    def _report(self, run: Run, status: str, **fields: Any) -> AttemptReport:
        return AttemptReport(*run.key, self.session, status, **fields)

    async def _watch_lease(self) -> None:
        loop = self._world.loop
        while True:
            await asyncio.sleep(1.0)
            if self.held and not self.has_lease and loop.time() - self._renewed_s > OFFLINE_STOP_S:
                for run in list(self.held.values()):
                    self._stop(run)
                    self._spool(run, "cancelled")

    # --- reports (hive_executor.reporter) ---

    async def _reports(self) -> None:
        backoff_s = BACKOFF_S
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self.spool or self._started or self._marks:
                if await self._send_reports():
                    backoff_s = BACKOFF_S
                    continue
                await asyncio.sleep(self._rng.uniform(0.5, 1.0) * backoff_s)
                backoff_s = min(2 * backoff_s, BACKOFF_MAX_S)

    async def _send_reports(self) -> bool:
        started, self._started = self._started, {}
        marks, self._marks = self._marks, {}
        running = [*started.items(), *marks.items()]
        reports = [*self.spool.values(), *(report for key, report in running if key not in self.spool)]
        if not reports:
            return True
        request = ReportRequest(session=self.session, reports=tuple(reports))
        reply = await self.ask(request)
        if reply is None or reply.error is not None:
            self._started = started | self._started
            self._marks = marks | self._marks
            return False
        sent = {(report.task, report.attempt): report for report in reports}
        for result in reply.results:
            key = result.task, result.attempt
            report = sent[key]
            self._world.oracle.answered(self, report, result.verdict)
            if report.status != "started":
                self.spool.pop(key, None)
            elif result.verdict != "accepted":
                self._discard(key)
        self._poke.set()
        return True

    async def ask(self, request: ReportRequest) -> ReportReply | None:
        """Report, and return the answer if one comes."""
        number = f"{self._rng.getrandbits(48):012x}"
        answer = self._answers[number] = self._world.loop.create_future()
        reply = f"{self._inbox}.report.{number}"
        await self.client.publish(report_subject(self.id), _encode(request), reply=reply)
        try:
            async with asyncio.timeout(ANSWER_S):
                data = await answer
        except TimeoutError:
            return None
        finally:
            del self._answers[number]
        return _report_reply(data) if data else None

    def _receive_report(self, message: Message) -> None:
        answer = self._answers.get(message.subject.rpartition(".")[2])
        if answer is not None and not answer.done():
            answer.set_result(message.data)


async def _set(event: asyncio.Event, timeout_s: float) -> bool:
    try:
        async with asyncio.timeout(timeout_s):
            await event.wait()
    except TimeoutError:
        return False
    return True
