"""Failures as data: a projection of the log with one row for each attempt that failed.

Where a task fails over results that its attempts gave, as those do whose results are judged, what these took, and
those that still ran, is lost with it, and counted there: each attempt once.

It is a projection of its own, so that it is rebuilt from old events as well, and in this service, whose events they
are. What led to a failure is read from its task's stream when it comes: failures are few, and nothing is kept for
the rest.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeVar

import msgspec
from hive_common.contracts import events
from hive_common.contracts.events import (
    AttemptFailed,
    AttemptLost,
    TaskAssigned,
    TaskCreated,
    TaskFailed,
    TaskReady,
    Usage,
)
from hive_common.contracts.values import Value, digest_of
from hive_common.eventlog.log import Stored
from hive_common.kernel.errors import CorruptLog, UnknownEvent
from hive_common.kernel.fingerprints import fingerprint_of, normalised
from psycopg import AsyncConnection

T = TypeVar("T")
KILLED: Final = "killed"
NOT_FAILED: Final = frozenset({"given_back", KILLED})
"""Why attempts are lost that did not fail: they were handed back, or stopped by an order."""
LOST: Final = "lost"
BATCH_EVENTS: Final = 100
"""Inputs of the tasks of a batch are read at once, to take their digests: 256 KiB each at most."""

_BEFORE: Final = """
SELECT e.stream, e.type, e.position, e.event, p.payload
  FROM log.events e LEFT JOIN log.payloads p ON p.position = e.position
 WHERE e.stream = ANY(%s) AND e.type = ANY(%s) AND e.position <= %s
 ORDER BY e.stream, e.version LIMIT 100000
"""
_ENDS: Final = ("AttemptFailed", "AttemptLost", "TaskFailed")
_TOLD: Final = ["TaskCreated", "TaskReady", "TaskAssigned", "AttemptSucceeded", "AttemptFailed", "AttemptLost"]
_INSERT: Final = (
    "INSERT INTO scheduler.failures (ns, owner, position, fingerprint, at_us, job_id, task_id, step, attempt,"
    " agent, executor, input_digest, wall_ms, attempts)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
)
_INSERT_KIND: Final = (
    "INSERT INTO scheduler.failure_kinds (ns, owner, fingerprint, agent, code, message)"
    " VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT DO NOTHING"
)
_ADD_CALLS: Final = (
    "INSERT INTO scheduler.attempt_calls AS c (ns, owner, task_id, attempt, calls, tokens, nano_usd)"
    " VALUES (%s, %s, %s, %s, %s, %s, %s) ON CONFLICT (ns, task_id, attempt) DO UPDATE SET"
    " calls = c.calls + excluded.calls, tokens = c.tokens + excluded.tokens,"
    " nano_usd = c.nano_usd + excluded.nano_usd"
)


class _Call(msgspec.Struct):
    """What of `ModelCallFinished` counts here: requests and answers, which can be large, are not decoded."""

    task: str = ""
    attempt: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    nano_usd: int = 0


_decode_call = msgspec.json.Decoder(_Call).decode


class _Result(msgspec.Struct):
    """What of `AttemptSucceeded` counts here: not its output."""

    attempt: int
    usage: Usage = Usage()


_decode_result = msgspec.json.Decoder(_Result).decode


class _Envelope(msgspec.Struct):
    schema: int
    ts_us: int


_decode_envelope = msgspec.json.Decoder(_Envelope).decode


class _Told:
    """What the stream of a task says of its attempts, up to some position."""

    def __init__(self) -> None:
        self.created: TaskCreated | None = None
        self.input: Value | None = None
        self.assigned: dict[int, tuple[str, int]] = {}
        """Executor and time, by attempt."""
        self.results: dict[int, int] = {}
        """Wall time of attempts that gave a result, in milliseconds."""
        self.ended: set[int] = set()
        """Attempts that gave none."""
        self.failed: list[tuple[int, str]] = []
        """Positions and codes of attempts that failed."""

    def gave(self, result: _Result, ts_us: int) -> None:
        _, since_us = self.assigned.get(result.attempt, ("", ts_us))
        self.results[result.attempt] = result.usage.wall_ms or max(0, ts_us - since_us) // 1_000

    def unaccounted(self, until_us: int) -> dict[int, int]:
        """Return the wall times of attempts that gave a result, or ran until then, by attempt."""
        running = {
            attempt: max(0, until_us - since_us) // 1_000
            for attempt, (_, since_us) in self.assigned.items()
            if attempt not in self.results and attempt not in self.ended
        }
        return self.results | running

    def add(self, position: int, ts_us: int, event: events.Event) -> None:
        match event:
            case TaskCreated():
                self.created, self.input = event, event.input
            case TaskReady():
                self.input = event.input
            case TaskAssigned():
                self.assigned[event.attempt] = event.executor, ts_us
            case AttemptFailed():
                self.failed.append((position, event.code))
                self.ended.add(event.attempt)
            case AttemptLost():
                self.failed.append((position, LOST))
                self.ended.add(event.attempt)


class FailuresProjection:
    """Failures, their kinds, and what model calls of attempts used (hive_common.eventlog.projection.Projection)."""

    name = "failures"
    types: Sequence[str] | None = (*_ENDS, "ModelCallFinished")

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        """Write what a batch adds (Projection)."""
        calls: defaultdict[tuple[str, str, str, int], list[int]] = defaultdict(lambda: [0, 0, 0])
        failures: list[tuple[Stored, events.Event]] = []
        for stored in batch:
            events.kind_of(stored.type, stored.schema)
            if stored.payload is None:
                continue
            if stored.type == "ModelCallFinished":
                _add_call(calls, stored)
            elif stored.type in _ENDS:
                event = events.decode(stored.type, stored.schema, stored.payload)
                if not _is_none(event):
                    failures.append((stored, event))
        rows, kinds = await _rows(conn, failures)
        async with conn.cursor() as cursor:
            for statement, values in (
                (_ADD_CALLS, [(*key, *counts) for key, counts in calls.items()]),
                (_INSERT_KIND, kinds),
                (_INSERT, rows),
            ):
                if values:
                    await cursor.executemany(statement, values)


def _add_call(calls: defaultdict[tuple[str, str, str, int], list[int]], stored: Stored) -> None:
    call = _read(_decode_call, stored.type, stored.payload or b"")
    if call.task and call.attempt:
        counts = calls[stored.ns, stored.owner, call.task, call.attempt]
        counts[0] += 1
        counts[1] += call.prompt_tokens + call.completion_tokens
        counts[2] += call.nano_usd


def _read(decode: Callable[[bytes], T], type_: str, payload: bytes) -> T:
    try:
        return decode(payload)
    except msgspec.DecodeError as error:
        raise UnknownEvent(f"the payload of {type_} does not fit its schema: {error}") from error


def _is_none(event: events.Event) -> bool:
    """Whether an event is no failure by itself: its attempt was stopped, or failed before and was counted then."""
    match event:
        case AttemptLost():
            return event.reason in NOT_FAILED
        case AttemptFailed():
            return event.code == KILLED
        case TaskFailed():
            return event.attempt is not None or event.code == KILLED
    return False


async def _rows(
    conn: AsyncConnection[Any], failures: Iterable[tuple[Stored, events.Event]]
) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
    found = [*failures]
    told = await _told(conn, found)
    rows: list[tuple[Any, ...]] = []
    kinds: dict[tuple[str, str], tuple[Any, ...]] = {}
    for stored, event in found:
        of_task = told[stored.stream]
        created = of_task.created
        if created is None:
            raise CorruptLog(f"position {stored.position}: task {stored.stream} failed before it was created")
        attempt, code, message, wall_ms = _what(event)
        if attempt == 0 and any(position < stored.position and code == one for position, one in of_task.failed):
            continue  # the task ends with what its last attempt ended with
        executor, since_us = of_task.assigned.get(attempt, ("", stored.ts_us))
        took_ms = {attempt: wall_ms or max(0, stored.ts_us - since_us) // 1_000}
        if attempt == 0:
            took_ms = of_task.unaccounted(stored.ts_us)
        agent = created.agent.partition("@")[0]
        fingerprint = fingerprint_of(agent, code, message)
        shown = normalised(message).encode(errors="replace").decode()
        kinds[stored.ns, fingerprint] = (stored.ns, stored.owner, fingerprint, agent, code, shown)
        rows.append(
            (
                *(stored.ns, stored.owner, stored.position, fingerprint, stored.ts_us, created.job, stored.stream),
                *(created.step, attempt, created.agent, executor, _digest(of_task.input)),
                *(sum(took_ms.values()), [*took_ms]),
            )
        )
    return rows, [*kinds.values()]


async def _told(conn: AsyncConnection[Any], failures: list[tuple[Stored, events.Event]]) -> dict[str, _Told]:
    """Read what led to failures. The log never changes, so that a replay reads the same."""
    told: dict[str, _Told] = defaultdict(_Told)
    if not failures:
        return told
    streams = list({stored.stream for stored, _ in failures})
    async with conn.cursor(binary=True) as cursor:
        # One by one: of a result that may be large, only what it took stays here.
        rows = cursor.stream(_BEFORE, (streams, _TOLD, failures[-1][0].position))
        async for stream, type_, position, envelope, payload in rows:
            if payload is None:
                continue
            said = _decode_envelope(envelope)
            if type_ == "AttemptSucceeded":
                told[stream].gave(_read(_decode_result, type_, payload), said.ts_us)
            else:
                told[stream].add(position, said.ts_us, events.decode(type_, said.schema, payload))
    return told


def _what(event: events.Event) -> tuple[int, str, str, int]:
    """Return attempt (0: none), code, message, and wall time if it was told."""
    match event:
        case AttemptFailed():
            return event.attempt, event.code, event.message, event.usage.wall_ms
        case AttemptLost():
            return event.attempt, LOST, event.reason, 0
        case TaskFailed():
            return 0, event.code, event.message, 0
    raise UnknownEvent(f"{type(event).__name__} is no failure")


def _digest(value: Value | None) -> str:
    return "" if value is None else value.digest or digest_of(value.raw or b"")
