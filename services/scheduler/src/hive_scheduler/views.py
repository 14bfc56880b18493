"""The views of jobs and tasks: one projection of the log, written in sets.

A batch of a thousand events costs a handful of statements, whatever is in it. Outputs and logs are not copied:
a view says at which position of the log they stand.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, Final

import msgspec
from hive_common.contracts import events
from hive_common.eventlog.log import Stored
from psycopg import AsyncConnection

from hive_scheduler.domain.task import STATUSES, TERMINAL
from hive_scheduler.submission import STATE_AFTER

CACHE_ROWS_MAX: Final = 50_000
"""Rows of tasks that have not ended, kept so that they need not be read back for each event."""

_TASK_COLUMNS: Final = (
    ("ns", "text"),
    ("owner", "text"),
    ("task_id", "text"),
    ("job_id", "text"),
    ("step", "text"),
    ("idx", "integer"),
    ("agent", "text"),
    ("state", "text"),
    ("attempts", "integer"),
    ("executor", "text"),
    ("error_code", "text"),
    ("error_message", "text"),
    ("created_us", "bigint"),
    ("ended_us", "bigint"),
    ("created_position", "bigint"),
    ("output_position", "bigint"),
    ("report_positions", "text"),
)
_JOB_COLUMNS: Final = (
    ("job_id", "text"),
    ("ns", "text"),
    ("owner", "text"),
    ("name", "text"),
    ("state", "text"),
    ("priority", "text"),
    ("caller", "text"),
    ("submitted_us", "bigint"),
    ("deadline_us", "bigint"),
    ("submitted_position", "bigint"),
)
_TASK_CHANGES: Final = (
    "state",
    "attempts",
    "executor",
    "error_code",
    "error_message",
    "ended_us",
    "output_position",
    "report_positions",
)


def _unnest(columns: Iterable[tuple[str, str]]) -> str:
    return ", ".join(f"%s::{kind}[]" for _, kind in columns)


_names = ", ".join(name for name, _ in _TASK_COLUMNS)
_sources = ", ".join(
    f"n.{name}::bigint[]" if name == "report_positions" else f"n.{name}" for name, _ in _TASK_COLUMNS
)
# Only constants of this module go into these statements.
_UPSERT_TASKS: Final = (
    f"INSERT INTO scheduler.tasks ({_names}) SELECT {_sources}"  # noqa: S608
    f" FROM unnest({_unnest(_TASK_COLUMNS)}) AS n ({_names})"
    " ON CONFLICT (ns, task_id) DO UPDATE SET " + ", ".join(f"{name} = excluded.{name}" for name in _TASK_CHANGES)
)
_SELECT_TASKS: Final = (
    f"SELECT {_names} FROM scheduler.tasks"  # noqa: S608
    " WHERE (ns, task_id) IN (SELECT * FROM unnest(%s::text[], %s::text[]))"
)
_job_names = ", ".join(name for name, _ in _JOB_COLUMNS)
_INSERT_JOBS: Final = f"INSERT INTO scheduler.jobs ({_job_names}) SELECT * FROM unnest({_unnest(_JOB_COLUMNS)})"  # noqa: S608
_CHANGE_JOBS: Final = """
UPDATE scheduler.jobs AS j
   SET state = coalesce(n.state, j.state), attempts = j.attempts + n.attempts, ended_us = n.ended_us,
       ended_position = n.ended_position, error_code = n.error_code, error_message = n.error_message,
       error_task = n.error_task
  FROM unnest(%s::text[], %s::text[], %s::text[], %s::integer[], %s::bigint[], %s::bigint[], %s::text[],
              %s::text[], %s::text[])
       AS n (ns, job_id, state, attempts, ended_us, ended_position, error_code, error_message, error_task)
 WHERE j.ns = n.ns AND j.job_id = n.job_id
"""
_CHANGE_STEPS: Final = (
    f"INSERT INTO scheduler.steps AS s (ns, job_id, step, owner, agent, first_position, {', '.join(STATUSES)})"  # noqa: S608
    f" SELECT * FROM unnest({', '.join(['%s::text[]'] * 5)}, %s::bigint[], {', '.join(['%s::integer[]'] * 6)})"
    " ON CONFLICT (ns, job_id, step) DO UPDATE SET "
    + ", ".join(f"{name} = s.{name} + excluded.{name}" for name in STATUSES)
)
_INSERT_POSITIONS: Final = """
INSERT INTO scheduler.job_positions (ns, owner, job_id, first_position, last_position, positions)
SELECT n.ns, n.owner, n.job_id, n.first_position, n.last_position, n.positions::bigint[]
  FROM unnest(%s::text[], %s::text[], %s::text[], %s::bigint[], %s::bigint[], %s::text[])
       AS n (ns, owner, job_id, first_position, last_position, positions)
"""


class TaskRow(msgspec.Struct):
    """A row of `scheduler.tasks` while a batch changes it; in order of `_TASK_COLUMNS`."""

    ns: str
    owner: str
    task_id: str
    job_id: str
    step: str
    idx: int
    agent: str
    state: str
    attempts: int
    executor: str
    error_code: str
    error_message: str
    created_us: int
    ended_us: int
    created_position: int
    output_position: int
    report_positions: list[int]

    def columns(self) -> tuple[Any, ...]:
        """Return the columns as they are sent."""
        return (*msgspec.structs.astuple(self)[:-1], _array(self.report_positions))


class _JobChange:
    __slots__ = ("attempts", "ended_position", "ended_us", "error", "state")

    def __init__(self) -> None:
        self.state: str | None = None
        self.attempts = 0
        self.ended_us = 0
        self.ended_position = 0
        self.error = ("", "", "")


class _Changes:
    """What a batch changes."""

    def __init__(self) -> None:
        self.tasks: dict[str, TaskRow] = {}
        self.new_jobs: list[tuple[Any, ...]] = []
        # By namespace and job; steps by their name besides, positions by their owner.
        self.jobs: defaultdict[tuple[str, str], _JobChange] = defaultdict(_JobChange)
        self.steps: dict[tuple[str, str, str], tuple[TaskRow, dict[str, int]]] = {}
        self.positions: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)

    def count(self, row: TaskRow, before: str | None, after: str) -> None:
        """Move a task from one state's count to another's."""
        key = row.ns, row.job_id, row.step
        found = self.steps.get(key)
        if found is None:
            found = self.steps[key] = (row, dict[str, int].fromkeys(STATUSES, 0))
        counts = found[1]
        if before is not None:
            counts[before] -= 1
        counts[after] += 1


class JobsProjection:
    """Jobs, tasks, steps and positions (hive_common.eventlog.projection.Projection)."""

    name = "jobs"
    # All of them: with a filter, a type that this code does not know would be skipped unseen (law 11).
    types: Sequence[str] | None = None

    def __init__(self) -> None:
        self._open: dict[str, TaskRow] = {}
        self._through = 0

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        """Write what a batch changes (Projection)."""
        if batch[0].position != self._through + 1 or len(self._open) > CACHE_ROWS_MAX:
            # What was cached may be of a transaction that never was committed.
            self._open.clear()
        self._through = batch[-1].position
        ours = [stored for stored in batch if events.kind_of(stored.type, stored.schema) in ("job", "task")]
        if not ours:
            return
        await self._load(conn, ours)
        changes = _Changes()
        for stored in ours:
            changes.positions[stored.ns, stored.owner, stored.correlation].append(stored.position)
            if stored.stream == stored.correlation:
                _apply_job(changes, stored)
            else:
                self._apply_task(changes, stored)
        await _write(conn, changes)
        for task_id, row in changes.tasks.items():
            if row.state in TERMINAL:
                self._open.pop(task_id, None)

    async def _load(self, conn: AsyncConnection[Any], ours: list[Stored]) -> None:
        created = {stored.stream for stored in ours if stored.type == "TaskCreated"}
        touched = {stored.stream: stored.ns for stored in ours if stored.stream != stored.correlation}
        missing = touched.keys() - created - self._open.keys()
        if missing:
            wanted = ([touched[task_id] for task_id in missing], list(missing))
            rows = await (await conn.execute(_SELECT_TASKS, wanted)).fetchall()
            for columns in rows:
                row = TaskRow(*columns)
                self._open[row.task_id] = row

    def _apply_task(self, changes: _Changes, stored: Stored) -> None:
        if stored.type == "AttemptLate":
            return
        if stored.type == "TaskCreated":
            row = _created(stored)
            self._open[row.task_id] = changes.tasks[row.task_id] = row
            changes.count(row, None, row.state)
            return
        row = self._open[stored.stream]
        changes.tasks[row.task_id] = row
        before = row.state
        _evolve(changes, row, stored)
        if row.state != before:
            changes.count(row, before, row.state)
            if row.state in TERMINAL:
                row.ended_us = stored.ts_us


def _created(stored: Stored) -> TaskRow:
    event = _decode(stored)
    assert isinstance(event, events.TaskCreated)
    state = "blocked" if event.input is None else "ready"
    index = -1 if event.index is None else event.index
    return TaskRow(
        stored.ns, stored.owner, stored.stream, event.job, event.step, index, event.agent, state, 0, "", "", "",
        stored.ts_us, 0, stored.position, 0, [],
    )  # fmt: skip


def _evolve(changes: _Changes, row: TaskRow, stored: Stored) -> None:
    match stored.type:
        case "TaskReady" | "TaskRetryScheduled":
            row.state = "ready"
        case "TaskAssigned":
            event = _decode(stored)
            assert isinstance(event, events.TaskAssigned)
            row.state, row.executor, row.attempts = "active", event.executor, event.attempt
            changes.jobs[row.ns, row.job_id].attempts += 1
        case "AttemptSucceeded":
            # Without decoding: outputs can be large, and a view only says where they are.
            row.report_positions = [*row.report_positions, stored.position]
            row.output_position = row.output_position or stored.position
        case "AttemptFailed":
            row.report_positions = [*row.report_positions, stored.position]
        case "TaskSucceeded":
            row.state = "succeeded"
        case "TaskCancelled":
            row.state = "cancelled"
        case "TaskFailed":
            event = _decode(stored)
            assert isinstance(event, events.TaskFailed)
            row.state, row.error_code, row.error_message = "failed", event.code, _text(event.message)


def _apply_job(changes: _Changes, stored: Stored) -> None:
    if stored.type == "JobSubmitted":
        event = _decode(stored)
        assert isinstance(event, events.JobSubmitted)
        changes.new_jobs.append(
            (
                stored.stream, stored.ns, stored.owner, event.name, "running", event.priority, event.caller,
                stored.ts_us, event.deadline_us, stored.position,
            )
        )  # fmt: skip
        return
    change = changes.jobs[stored.ns, stored.stream]
    change.state = STATE_AFTER[stored.type]
    if stored.type in events.JOB_TERMINAL:
        change.ended_us, change.ended_position = stored.ts_us, stored.position
    if stored.type == "JobFailed":
        event = _decode(stored)
        assert isinstance(event, events.JobFailed)
        change.error = event.code, _text(event.message), event.task or ""


async def _write(conn: AsyncConnection[Any], changes: _Changes) -> None:
    async with conn.pipeline():
        if changes.new_jobs:
            await conn.execute(_INSERT_JOBS, [list(column) for column in zip(*changes.new_jobs, strict=True)])
        if changes.jobs:
            await conn.execute(_CHANGE_JOBS, _job_arrays(changes))
        if changes.tasks:
            rows = [list(row.columns()) for row in changes.tasks.values()]
            await conn.execute(_UPSERT_TASKS, [list(column) for column in zip(*rows, strict=True)])
        if changes.steps:
            await conn.execute(_CHANGE_STEPS, _step_arrays(changes))
        await conn.execute(_INSERT_POSITIONS, _position_arrays(changes))


def _job_arrays(changes: _Changes) -> list[list[Any]]:
    rows = [
        (*key, change.state, change.attempts, change.ended_us, change.ended_position, *change.error)
        for key, change in changes.jobs.items()
    ]
    return [list(column) for column in zip(*rows, strict=True)]


def _step_arrays(changes: _Changes) -> list[list[Any]]:
    rows = [
        (*key, row.owner, row.agent, row.created_position, *(counts[name] for name in STATUSES))
        for key, (row, counts) in changes.steps.items()
    ]
    return [list(column) for column in zip(*rows, strict=True)]


def _position_arrays(changes: _Changes) -> list[list[Any]]:
    rows = [(*key, positions[0], positions[-1], _array(positions)) for key, positions in changes.positions.items()]
    return [list(column) for column in zip(*rows, strict=True)]


def _array(positions: list[int]) -> str:
    """Return an array as PostgreSQL reads it from text: an unnest of arrays would flatten them."""
    return "{" + ",".join(map(str, positions)) + "}"


def _decode(stored: Stored) -> events.Event | None:
    return None if stored.payload is None else events.decode(stored.type, stored.schema, stored.payload)


def _text(message: str) -> str:
    """Return a message as a text column takes it."""
    return message.replace("\x00", "\ufffd")
