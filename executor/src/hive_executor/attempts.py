"""The attempts that this executor holds: fetched, run, and turned into outcomes in the spool."""

import asyncio
import enum
import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
from hive_common.artifacts.signing import untrusted
from hive_common.contracts.events import Usage
from hive_common.contracts.limits import (
    DETAIL_BYTES_MAX,
    LOG_BYTES_MAX,
    OUTPUT_BYTES_MAX,
    STARTED_AFTER_MS,
)
from hive_common.contracts.messages import Assignment, AttemptKey, AttemptReport, LogLine
from hive_common.contracts.permissions import NONE
from hive_common.contracts.values import Value, by_digest, fits_inline, inline
from hive_common.control.orders import in_words
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import (
    HiveError,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    PermissionDenied,
    Unavailable,
)

from hive_executor.agents import Agents
from hive_executor.blobs import BlobClient
from hive_executor.gate import Gate, Prefetch
from hive_executor.host import Marks, Means, always, approvals_of, forked, granted, keep, scratch
from hive_executor.live_log import LiveLog, LiveLogs
from hive_executor.metrics import ASSIGNMENTS, ATTEMPT_DURATION, ATTEMPTS, HELD, RUNNING
from hive_executor.permits import Permits
from hive_executor.sandbox import Limits, Outcome, RunnerPool
from hive_executor.sandbox.model import INVALID_MODULE, INVALID_OUTPUT, OUTPUT_EXCEEDED, PERMISSION_DENIED
from hive_executor.spool import Spool

log = logging.getLogger(__name__)

SEEN_MAX: Final = 50_000
"""Attempts that are remembered after their end. An assignment is sent again only until its outcome is committed."""

LOG_INLINE_BYTES_MAX: Final = 64 << 10
"""With an output of 256 KiB and a traceback, a log of this size still fits into one report."""

MESSAGE_CHARS_MAX: Final = 1_024

_UNUSED: Final = Usage()


class Ending(enum.Enum):
    """Why an attempt is stopped from outside."""

    GIVEN_BACK = "given_back"
    """The scheduler is told, so that it can place the task elsewhere."""
    DISCARDED = "discarded"
    """The scheduler does not wait for an outcome."""
    DISTRUSTED = "distrusted"
    """Nobody trusts any more who signed its agent: the attempt has failed."""
    KILLED = "killed"
    """By a kill order. The scheduler knows of it; where it gives the attempt again, it may run again."""


class Held:
    """One attempt between its assignment and its outcome in the spool."""

    def __init__(self, assignment: Assignment, key: AttemptKey) -> None:
        self.assignment = assignment
        self.key = key
        self.started_us = 0
        self.ending: Ending | None = None
        self.reason = ""
        self.has_begun = False
        self.has_ended = False
        self.task: asyncio.Task[None] | None = None
        self.marks: Marks | None = None


class Attempts:
    """Runs what is assigned.

    Args:
        session: of this process; stands in every outcome.
        on_change: called when a slot is free again or an outcome is in the spool.
        on_started: takes a `started` report of an attempt that runs longer than 500 ms.
        on_progress: takes a report of how far an attempt is.
        means: with what guests get what they were granted.
        permits: say what that is.
        stopped: returns the kill order's entry by which an assignment is stopped, or None.
    """

    def __init__(
        self,
        *,
        session: str,
        agents: Agents,
        blobs: BlobClient,
        pool: RunnerPool,
        spool: Spool,
        live_logs: LiveLogs,
        gate: Gate,
        prefetch: Prefetch,
        memory_bytes: int,
        clock: Clock,
        on_change: Callable[[], None],
        on_started: Callable[[AttemptReport], None],
        on_progress: Callable[[AttemptReport], None],
        means: Means,
        permits: Permits,
        stopped: Callable[[Assignment], str | None],
    ) -> None:
        self._session = session
        self._agents = agents
        self._blobs = blobs
        self._pool = pool
        self._spool = spool
        self._live_logs = live_logs
        self._gate = gate
        self._prefetch = prefetch
        self._memory_bytes = memory_bytes
        self._clock = clock
        self._on_change = on_change
        self._on_started = on_started
        self._on_progress = on_progress
        self._means = means
        self._permits = permits
        self._stopped = stopped
        self._held: dict[AttemptKey, Held] = {}
        self._seen: OrderedDict[AttemptKey, None] = OrderedDict()
        self._unfinished = 0
        self._is_closing = False

    @property
    def keys(self) -> tuple[AttemptKey, ...]:
        """Attempts that wait or run."""
        return tuple(self._held)

    @property
    def is_busy(self) -> bool:
        """Say whether attempts wait for a slot here, so that doing several things at once costs no time."""
        return self._unfinished > self._gate.slots

    @property
    def slots_free(self) -> int:
        """How many more attempts are wanted now.

        None while enough wait here already: asking for each one that ends would make a message of each.
        """
        depth = self._prefetch.depth
        if self._is_closing or self._unfinished >= self._gate.slots + (depth + 1) // 2:
            return 0
        wanted = self._gate.slots + depth - self._unfinished
        return max(0, min(wanted, self._spool.room - len(self._held)))

    def ahead(self, more: int) -> int:
        """Return how many attempts wait for a slot here, with so many more."""
        return max(0, self._unfinished + more - self._gate.slots)

    @property
    def memory_free_bytes(self) -> int:
        """Memory for one more guest, whichever of the held ones run together."""
        needs = (held.assignment.memory_bytes + held.assignment.agent.scratch_bytes for held in self._held.values())
        largest = sorted(needs, reverse=True)
        return max(0, self._memory_bytes - sum(largest[: self._gate.slots]))

    def take(self, assignment: Assignment) -> None:
        """Start an attempt, unless it was seen before."""
        key = AttemptKey(assignment.task, assignment.attempt)
        if key in self._held or key in self._seen or key in self._spool:
            ASSIGNMENTS.labels("duplicate").inc()
            return
        ASSIGNMENTS.labels("taken").inc()
        held = self._held[key] = Held(assignment, key)
        self._unfinished += 1
        if self._is_closing:
            held.ending, held.reason = Ending.GIVEN_BACK, "the executor stops"
        elif (entry := self._stopped(assignment)) is not None:
            held.ending, held.reason = Ending.GIVEN_BACK, f"a kill order stops {in_words(entry)}"
        held.task = asyncio.create_task(self._attempt(held), name=f"attempt {key.task}-{key.attempt}")
        HELD.set(len(self._held))

    def discard(self, keys: Iterable[AttemptKey]) -> None:
        """Kill attempts that the scheduler does not want any more, also before they arrive."""
        for key in keys:
            held = self._held.get(key)
            if held is not None:
                self._end(held, Ending.DISCARDED, "no longer wanted")
            else:
                self._remember(key)

    def end_untrusted(self, trusts: Callable[[str], bool]) -> None:
        """Kill what was signed by a key that is not trusted any more, now."""
        for held in list(self._held.values()):
            agent = held.assignment.agent
            if not trusts(agent.signer):
                reason = untrusted(f"{agent.name}@{agent.version}", agent.signer).message
                self._end(held, Ending.DISTRUSTED, reason)

    def kill_stopped(self) -> None:
        """Kill what a kill order stops, now."""
        for held in list(self._held.values()):
            if self._stopped(held.assignment) is not None:
                self._end(held, Ending.KILLED, "killed")

    def give_back(self, reason: str, *, waiting_only: bool = False) -> None:
        """Stop attempts and say that they were not done."""
        for held in list(self._held.values()):
            if not (waiting_only and held.started_us):
                self._end(held, Ending.GIVEN_BACK, reason)

    def tell_progress(self) -> None:
        """Tell again how far the attempts are that have said so: a new leader does not know."""
        for held in self._held.values():
            if held.marks is not None and held.marks.told:
                self._tell_progress(held, held.marks.told)

    def discard_all(self) -> None:
        """Kill everything, without an outcome: another session has taken over."""
        self._is_closing = True
        for held in list(self._held.values()):
            self._end(held, Ending.DISCARDED, "superseded")

    async def close(self, grace_s: float) -> None:
        """Take nothing more, give back what waits, let running guests end for `grace_s`, give back the rest."""
        self._is_closing = True
        self.give_back("the executor stops", waiting_only=True)
        if self._held:
            await self._ended(grace_s)
        self.give_back("the executor stops")
        await self._ended(None)

    async def _ended(self, timeout_s: float | None) -> None:
        tasks = {held.task for held in self._held.values() if held.task is not None}
        if tasks:
            await asyncio.wait(tasks, timeout=timeout_s)

    def _end(self, held: Held, ending: Ending, reason: str) -> None:
        if held.ending is not None or held.has_ended:
            return
        held.ending, held.reason = ending, reason
        # A task that is cancelled before its first step never gets to its own clean-up.
        if held.has_begun and held.task is not None:
            held.task.cancel()

    def _remember(self, key: AttemptKey) -> None:
        self._seen[key] = None
        if len(self._seen) > SEEN_MAX:
            self._seen.popitem(last=False)

    async def _attempt(self, held: Held) -> None:
        """From the assignment to the outcome in the spool, however it ends."""
        held.has_begun = True
        try:
            try:
                report = await self._outcome(held)
            finally:
                held.has_ended = True
                self._unfinished -= 1
            if report is not None:
                ATTEMPTS.labels(report.status, report.code or "").inc()
                self._spool.add(report)
            else:
                ATTEMPTS.labels("discarded", "").inc()
        finally:
            # What could not be kept must not be run again by this session either.
            if held.ending is not Ending.KILLED:
                self._remember(held.key)
            self._held.pop(held.key, None)
            HELD.set(len(self._held))
            self._on_change()

    async def _outcome(self, held: Held) -> AttemptReport | None:
        try:
            if held.ending is None:
                return await self._run(held)
        except asyncio.CancelledError:
            if held.ending is None:
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
        except (InvalidArgument, NotFound) as error:
            return self._failed(held, INVALID_MODULE, error.message)
        except PermissionDenied as error:
            return self._failed(held, PERMISSION_DENIED, error.message)
        except HiveError as error:
            log.warning("attempt %s-%d given back: %s", held.key.task, held.key.attempt, error.message)
            held.reason = error.message
        except Exception as error:
            # A defect of this executor is no verdict on the agent; elsewhere it may succeed.
            log.exception("attempt %s-%d failed inside the executor", held.key.task, held.key.attempt)
            held.reason = f"the executor failed: {type(error).__name__}"
        if held.ending is Ending.DISTRUSTED:
            return self._failed(held, PERMISSION_DENIED, held.reason)
        if held.ending in (Ending.DISCARDED, Ending.KILLED):
            return None
        return self._report(held, "cancelled", message=held.reason)

    async def _run(self, held: Held) -> AttemptReport:
        assignment = held.assignment
        program = await self._agents.program(assignment.agent)
        try:
            input_ = assignment.input.raw
            if input_ is None:
                input_ = await self._blobs.fetch(assignment.input.digest or "")
        except (InvalidArgument, NotFound) as error:
            raise Unavailable(f"the input cannot be had: {error.message}") from error
        limits = Limits(
            wall_ms=assignment.timeout_ms,
            memory_bytes=assignment.memory_bytes,
            fuel=assignment.fuel,
            output_bytes=OUTPUT_BYTES_MAX,
            log_bytes=LOG_BYTES_MAX,
        )
        try:
            claims = self._permits.claims(assignment)
            permissions = NONE if claims is None else claims.permissions
            approvals = approvals_of(assignment, permissions, self._means)
            capabilities = granted(assignment, permissions, self._means, approvals, claims)
            scratch_bytes = await scratch(permissions, approvals)
        except PermissionDenied as error:
            return self._failed(held, PERMISSION_DENIED, error.message)
        live = self._live_logs.begin(assignment)
        timer: asyncio.TimerHandle | None = None
        try:
            # Files of a guest are in memory.
            async with self._gate.admitted(assignment.memory_bytes + scratch_bytes):
                held.started_us = self._clock.now_us()
                loop = asyncio.get_running_loop()
                timer = loop.call_later(STARTED_AFTER_MS / 1000, self._runs_long, held, live)
                held.marks = marks = Marks(lambda permille: self._tell_progress(held, permille))
                RUNNING.set(self._gate.running)
                outcome = await self._pool.run(
                    program,
                    input_,
                    limits,
                    on_log=live.write,
                    granted={**capabilities, **always(marks.said)},
                    scratch_bytes=scratch_bytes,
                    limit=approvals.limit,
                    # What somebody has a guest stopped for may be what it has done to its runner.
                    spares_runner=lambda: held.ending not in (Ending.KILLED, Ending.DISTRUSTED),
                )
        finally:
            if timer is not None:
                timer.cancel()
            if held.marks is not None:
                held.marks.close()
                held.marks = None
            self._live_logs.end(live)
            RUNNING.set(self._gate.running)
        self._prefetch.observe(outcome.wall_ms)
        ATTEMPT_DURATION.observe(outcome.wall_ms / 1000)
        report = await self._report_of(held, outcome)
        if report.status == "succeeded":
            try:
                await keep(capabilities)
            except PermissionDenied as error:
                return self._failed(held, PERMISSION_DENIED, error.message, report.usage, report.log)
            if children := forked(capabilities):
                report = msgspec.structs.replace(report, forks=children)
        return report

    def _runs_long(self, held: Held, live: LiveLog) -> None:
        self._live_logs.open(live)
        self._on_started(self._report(held, "started"))

    def _tell_progress(self, held: Held, permille: int) -> None:
        self._on_progress(msgspec.structs.replace(self._report(held, "started"), done_permille=permille))

    async def _report_of(self, held: Held, outcome: Outcome) -> AttemptReport:
        usage = Usage(outcome.wall_ms, outcome.fuel_used, outcome.memory_peak_bytes or 0)
        log_value = await self._log_value(outcome)
        if outcome.status != "succeeded" or outcome.output is None:
            if outcome.status == "cancelled":
                return self._report(held, "cancelled", message=outcome.message)
            return self._report(
                held,
                "failed",
                code=outcome.code,
                message=_clipped(outcome.message, MESSAGE_CHARS_MAX),
                detail=_clipped(outcome.detail, DETAIL_BYTES_MAX),
                usage=usage,
                log_value=log_value,
            )
        try:
            output = await self._output_value(outcome.output)
        except msgspec.DecodeError as error:
            return self._failed(held, INVALID_OUTPUT, f"the output is not JSON: {error}", usage, log_value)
        except PayloadTooLarge as error:
            return self._failed(held, OUTPUT_EXCEEDED, error.message, usage, log_value)
        return self._report(held, "succeeded", output=output, usage=usage, log_value=log_value)

    async def _output_value(self, output: bytes) -> Value:
        # The runner has checked this, but a runner is not trusted: one bad output would spoil a whole report.
        msgspec.json.decode(output, type=msgspec.Raw)
        if fits_inline(output):
            return inline(output)
        await self._blobs.store(output)
        return by_digest(output)

    async def _log_value(self, outcome: Outcome) -> Value | None:
        if not outcome.log:
            return None
        lines = [LogLine(line.ts_us, line.level, line.text) for line in outcome.log]
        if outcome.log_truncated:
            lines.append(LogLine(lines[-1].ts_us, "warning", f"the log was cut at {LOG_BYTES_MAX} bytes"))
        encoded = _encoded(lines, LOG_BYTES_MAX)
        if len(encoded) <= LOG_INLINE_BYTES_MAX:
            return inline(encoded)
        try:
            await self._blobs.store(encoded)
        except HiveError as error:
            # The work is done; a shorter log is better than doing it again.
            log.warning("a log of %d bytes could not be stored: %s", len(encoded), error.message)
            return inline(_encoded(lines, LOG_INLINE_BYTES_MAX))
        return by_digest(encoded)

    def _failed(
        self, held: Held, code: str, message: str, usage: Usage = _UNUSED, log_value: Value | None = None
    ) -> AttemptReport:
        message = _clipped(message, MESSAGE_CHARS_MAX)
        return self._report(held, "failed", code=code, message=message, usage=usage, log_value=log_value)

    def _report(
        self,
        held: Held,
        status: str,
        *,
        output: Value | None = None,
        code: str | None = None,
        message: str = "",
        detail: str = "",
        usage: Usage = _UNUSED,
        log_value: Value | None = None,
    ) -> AttemptReport:
        return AttemptReport(
            task=held.key.task,
            attempt=held.key.attempt,
            session=self._session,
            status=status,
            started_us=held.started_us,
            ended_us=0 if status == "started" else self._clock.now_us(),
            output=output,
            code=code,
            message=message,
            detail=detail,
            usage=usage,
            log=log_value,
        )


def _clipped(text: str, length_max: int) -> str:
    return text if len(text) <= length_max else text[: length_max - 1] + "…"


def _encoded(lines: list[LogLine], bytes_max: int) -> bytes:
    """Return a log as JSON; where it does not fit, its end, with a first line that says so."""
    encoded = msgspec.json.encode(lines)
    if len(encoded) <= bytes_max:
        return encoded
    kept: list[LogLine] = []
    size = 1024  # for the line that says so
    for line in reversed(lines):
        size += len(msgspec.json.encode(line)) + 1
        if size > bytes_max:
            break
        kept.append(line)
    missing = len(lines) - len(kept)
    kept.append(LogLine(lines[0].ts_us, "warning", f"{missing} earlier lines did not fit"))
    return msgspec.json.encode(kept[::-1])
