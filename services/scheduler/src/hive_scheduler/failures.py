"""Failures as data: a projection of the log with one row for each attempt that failed.

It is one of its own, so that it is rebuilt from old events as well, and in this service, whose events they are.
What led to a failure is read from its task's stream when it comes: failures are few, and nothing is kept for the
rest.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from hive_common.contracts import events
from hive_common.contracts.events import (
    AttemptFailed,
    AttemptLost,
    TaskAssigned,
    TaskCreated,
    TaskFailed,
    TaskReady,
)
from hive_common.contracts.values import Value, digest_of
from hive_common.eventlog.log import Stored
from hive_common.kernel.errors import CorruptLog, UnknownEvent
from hive_common.kernel.fingerprints import fingerprint_of, normalised
from psycopg import AsyncConnection

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
_TOLD: Final = ["TaskCreated", "TaskReady", "TaskAssigned", "AttemptFailed", "AttemptLost"]
_INSERT: Final = (
    "INSERT INTO scheduler.failures (ns, owner, position, fingerprint, at_us, job_id, task_id, step, attempt,"
    " agent, executor, input_digest, wall_ms) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s, %s)"
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
        self.failed: list[tuple[int, str]] = []
        """Positions and codes of attempts that failed."""

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
            case AttemptLost():
                self.failed.append((position, LOST))


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
    try:
        call = _decode_call(stored.payload or b"")
    except msgspec.DecodeError as error:
        raise UnknownEvent(f"the payload of {stored.type} does not fit its schema: {error}") from error
    if call.task and call.attempt:
        counts = calls[stored.ns, stored.owner, call.task, call.attempt]
        counts[0] += 1
        counts[1] += call.prompt_tokens + call.completion_tokens
        counts[2] += call.nano_usd


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
        agent = created.agent.partition("@")[0]
        fingerprint = fingerprint_of(agent, code, message)
        shown = normalised(message).encode(errors="replace").decode()
        kinds[stored.ns, fingerprint] = (stored.ns, stored.owner, fingerprint, agent, code, shown)
        rows.append(
            (
                *(stored.ns, stored.owner, stored.position, fingerprint, stored.ts_us, created.job, stored.stream),
                *(created.step, attempt, created.agent, executor, _digest(of_task.input)),
                wall_ms or max(0, stored.ts_us - since_us) // 1_000,
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
        await cursor.execute(_BEFORE, (streams, _TOLD, failures[-1][0].position))
        for stream, type_, position, envelope, payload in await cursor.fetchall():
            if payload is not None:
                said = _decode_envelope(envelope)
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
