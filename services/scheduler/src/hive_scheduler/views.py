"""The views of jobs and tasks: one projection of the log, written in sets.

A batch of a thousand events costs a handful of statements, whatever is in it. Outputs and logs are not copied:
a view says at which position of the log they stand.
"""

import asyncio
import functools
import operator
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Final

import msgspec
from hive_common.contracts import events
from hive_common.eventlog import pgarrays
from hive_common.eventlog.log import Stored
from psycopg import AsyncConnection

from hive_scheduler.domain.task import STATUSES, TERMINAL
from hive_scheduler.submission import STATE_AFTER

CACHE_ROWS_MAX: Final = 50_000
"""Rows of tasks that have not ended, kept so that they need not be read back for each event."""
OURS: Final = ("job", "task", "approval")
"""Kinds of events that belong to a job. Approvals have no rows: what is open is in the leader's memory."""
TURN_EVENTS: Final = 256
"""After so many events of a batch others have a turn on the loop: leases are kept there."""

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
    ("report_positions", "bigint[]"),
    ("parent", "text"),
    ("judged", "text"),
)
_TASK_KEY: Final = ("ns", "task_id")
_TASK_CHANGES: Final = (
    "state",
    "attempts",
    "executor",
    "error_code",
    "error_message",
    "ended_us",
    "output_position",
    "report_positions",
    "judged",
)
_JOB_COLUMNS: Final = (
    ("ns", "text"),
    ("job_id", "text"),
    ("owner", "text"),
    ("name", "text"),
    ("priority", "text"),
    ("caller", "text"),
    ("submitted_us", "bigint"),
    ("deadline_us", "bigint"),
    ("submitted_position", "bigint"),
    ("canary", "text"),
)
_JOB_CHANGES: Final = (
    ("state", "text"),
    ("attempts", "integer"),
    ("ended_us", "bigint"),
    ("ended_position", "bigint"),
    ("error_code", "text"),
    ("error_message", "text"),
    ("error_task", "text"),
)
_STEP_COLUMNS: Final = (
    ("ns", "text"),
    ("job_id", "text"),
    ("step", "text"),
    ("owner", "text"),
    ("agent", "text"),
    ("first_position", "bigint"),
    *((status, "integer") for status in STATUSES),
)
_POSITION_COLUMNS: Final = (
    ("ns", "text"),
    ("owner", "text"),
    ("job_id", "text"),
    ("first_position", "bigint"),
    ("last_position", "bigint"),
    ("positions", "bigint[]"),
)

Columns = Sequence[tuple[str, str]]


def _names(columns: Columns) -> str:
    return ", ".join(name for name, _ in columns)


def _rows(columns: Columns) -> str:
    """Return the rows of packed arrays, one for each column, as `n`. An array in a column comes as text:
    an unnest of arrays would flatten them."""
    kinds = ", ".join(f"%b::{'text' if kind.endswith('[]') else kind}[]" for _, kind in columns)
    return f"unnest({kinds}) AS n ({_names(columns)})"


def _selected(columns: Columns) -> str:
    return ", ".join(f"n.{name}::{kind}" if kind.endswith("[]") else f"n.{name}" for name, kind in columns)


_TASK_UPDATED: Final = tuple(column for column in _TASK_COLUMNS if column[0] in (*_TASK_KEY, *_TASK_CHANGES))
# Only constants of this module go into these statements.
_INSERT_TASKS: Final = (
    f"INSERT INTO scheduler.tasks ({_names(_TASK_COLUMNS)})"  # noqa: S608
    f" SELECT {_selected(_TASK_COLUMNS)} FROM {_rows(_TASK_COLUMNS)}"
)
_CHANGE_TASKS: Final = (
    "UPDATE scheduler.tasks AS t SET "  # noqa: S608
    + ", ".join(f"{name} = {_selected([(name, kind)])}" for name, kind in _TASK_UPDATED if name not in _TASK_KEY)
    + f" FROM {_rows(_TASK_UPDATED)} WHERE t.ns = n.ns AND t.task_id = n.task_id"
)
_SELECT_TASKS: Final = (
    f"SELECT {_names(_TASK_COLUMNS)} FROM scheduler.tasks"  # noqa: S608
    " WHERE (ns, task_id) IN (SELECT * FROM unnest(%s::text[], %s::text[]))"
)
_INSERT_JOBS: Final = (
    f"INSERT INTO scheduler.jobs ({_names(_JOB_COLUMNS + _JOB_CHANGES)})"  # noqa: S608
    f" SELECT * FROM {_rows(_JOB_COLUMNS + _JOB_CHANGES)}"
)
_CHANGE_JOBS: Final = (
    "UPDATE scheduler.jobs AS j SET state = coalesce(nullif(n.state, ''), j.state),"  # noqa: S608
    " attempts = j.attempts + n.attempts, ended_us = n.ended_us, ended_position = n.ended_position,"
    " error_code = n.error_code, error_message = n.error_message, error_task = n.error_task"
    f" FROM {_rows(_JOB_COLUMNS[:2] + _JOB_CHANGES)} WHERE j.ns = n.ns AND j.job_id = n.job_id"
)
_CHANGE_STEPS: Final = (
    f"INSERT INTO scheduler.steps AS s ({_names(_STEP_COLUMNS)}) SELECT * FROM {_rows(_STEP_COLUMNS)}"  # noqa: S608
    " ON CONFLICT (ns, job_id, step) DO UPDATE SET "
    + ", ".join(f"{name} = s.{name} + excluded.{name}" for name in STATUSES)
)
_INSERT_POSITIONS: Final = (
    f"INSERT INTO scheduler.job_positions ({_names(_POSITION_COLUMNS)})"  # noqa: S608
    f" SELECT {_selected(_POSITION_COLUMNS)} FROM {_rows(_POSITION_COLUMNS)}"
)


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
    parent: str
    judged: str


class Judged(msgspec.Struct, omit_defaults=True):
    """What the row of a judged task, or of a judge, says besides (`judged`, as JSON); other rows have none.

    Attributes:
        replicas: attempts that were planned at first; 0 where nothing is judged.
        judging: what the task judges, or joins.
        successes: where `AttemptSucceeded` stands, by attempt.
        kept: attempts whose outputs are the task's, where all valid ones are kept.
        decision: where `TaskDecided` stands, 0 before.
    """

    replicas: int = 0
    judging: events.Judging | None = None
    successes: dict[int, int] = {}
    kept: tuple[int, ...] = ()
    decision: int = 0

    @property
    def kept_positions(self) -> list[int]:
        """Where the outputs stand that are kept, in order of attempts."""
        return [self.successes[attempt] for attempt in sorted(self.kept) if attempt in self.successes]


class _Numbered(msgspec.Struct):
    """The attempt that an event is about; the rest of the payload, which may be large, is passed over."""

    attempt: int


_judged = msgspec.json.Decoder(Judged)
_numbered = msgspec.json.Decoder(_Numbered)


def judged_of(text: str) -> Judged:
    """Return what a row's `judged` says."""
    return _judged.decode(text) if text else Judged()


class _JobChange:
    __slots__ = ("attempts", "ended_position", "ended_us", "error", "state")

    def __init__(self) -> None:
        self.state: str | None = None
        self.attempts = 0
        self.ended_us = 0
        self.ended_position = 0
        self.error = ("", "", "")

    def columns(self) -> tuple[Any, ...]:
        """Return the columns after the state (`_JOB_CHANGES`)."""
        return (self.attempts, self.ended_us, self.ended_position, *self.error)


class _Changes:
    """What a batch changes."""

    def __init__(self) -> None:
        self.new_tasks: dict[str, TaskRow] = {}
        # Known from earlier batches.
        self.tasks: dict[str, TaskRow] = {}
        # By namespace and job: what does not change of it.
        self.new_jobs: dict[tuple[str, str], tuple[Any, ...]] = {}
        # By namespace and job; steps by their name besides, positions by their owner.
        self.jobs: defaultdict[tuple[str, str], _JobChange] = defaultdict(_JobChange)
        self.steps: dict[tuple[str, str, str], tuple[TaskRow, dict[str, int]]] = {}
        self.positions: defaultdict[tuple[str, str, str], list[int]] = defaultdict(list)

    def count(self, row: TaskRow, before: str | None, after: str) -> None:
        """Move a task from one state's count to another's."""
        if row.judged and judged_of(row.judged).judging is not None:
            return  # a judge is no task of its step
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
        ours = [stored for stored in batch if events.kind_of(stored.type, stored.schema) in OURS]
        if not ours:
            return
        await self._load(conn, ours)
        changes = _Changes()
        for number, stored in enumerate(ours):
            if number % TURN_EVENTS == TURN_EVENTS - 1:
                await asyncio.sleep(0)
            changes.positions[stored.ns, stored.owner, stored.correlation].append(stored.position)
            if stored.stream == stored.correlation:
                _apply_job(changes, stored)
            elif not stored.type.startswith("Approval"):
                self._apply_task(changes, stored)
        await _write(conn, changes)
        for rows in (changes.tasks, changes.new_tasks):
            for task_id, row in rows.items():
                if row.state in TERMINAL:
                    self._open.pop(task_id, None)

    async def _load(self, conn: AsyncConnection[Any], ours: list[Stored]) -> None:
        created = {stored.stream for stored in ours if stored.type == "TaskCreated"}
        touched = {
            stored.stream: stored.ns
            for stored in ours
            if stored.stream != stored.correlation and not stored.type.startswith("Approval")
        }
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
            self._open[row.task_id] = changes.new_tasks[row.task_id] = row
            changes.count(row, None, row.state)
            return
        row = self._open[stored.stream]
        if row.task_id not in changes.new_tasks:
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
    judged = ""
    if event.replicas or event.judging is not None:
        judged = _json(Judged(event.replicas, event.judging))
    return TaskRow(
        stored.ns, stored.owner, stored.stream, event.job, event.step, index, event.agent, state, 0, "", "", "",
        stored.ts_us, 0, stored.position, 0, [], event.parent or "", judged,
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
            if row.judged:
                _note_success(row, stored)
            else:
                row.output_position = row.output_position or stored.position
        case "TaskDecided":
            _note_decision(row, stored)
        case "AttemptFailed":
            row.report_positions = [*row.report_positions, stored.position]
        case "TaskSucceeded":
            row.state = "succeeded"
            if row.judged and stored.payload is not None:
                attempt = _numbered.decode(stored.payload).attempt
                row.output_position = judged_of(row.judged).successes.get(attempt, 0)
        case "TaskCancelled":
            row.state = "cancelled"
        case "TaskFailed":
            event = _decode(stored)
            assert isinstance(event, events.TaskFailed)
            row.state, row.error_code, row.error_message = "failed", event.code, _text(event.message)


def _note_success(row: TaskRow, stored: Stored) -> None:
    """Of several successes each may decide, so it is known where each stands."""
    if stored.payload is not None:
        judged = judged_of(row.judged)
        judged.successes[_numbered.decode(stored.payload).attempt] = stored.position
        row.judged = _json(judged)


def _note_decision(row: TaskRow, stored: Stored) -> None:
    judged = judged_of(row.judged)
    judged.decision = stored.position
    event = _decode(stored)
    if isinstance(event, events.TaskDecided):
        decision = event.decision
        judged.kept = decision.votes if decision.outcome == "kept" else ()
        winners = [one.executor for one in decision.candidates if one.attempt == decision.winner]
        row.executor = winners[0] if winners else row.executor
    row.judged = _json(judged)


def _apply_job(changes: _Changes, stored: Stored) -> None:
    if stored.type == "JobSubmitted":
        event = _decode(stored)
        assert isinstance(event, events.JobSubmitted)
        changes.new_jobs[stored.ns, stored.stream] = (
            stored.owner, event.name, event.priority, event.caller, stored.ts_us, event.deadline_us,
            stored.position, event.canary,
        )  # fmt: skip
        return
    if stored.type == "StepJoined":
        return  # it says what became of results, and changes no state
    change = changes.jobs[stored.ns, stored.stream]
    change.state = STATE_AFTER[stored.type]
    if stored.type in events.JOB_TERMINAL:
        change.ended_us, change.ended_position = stored.ts_us, stored.position
    if stored.type == "JobFailed":
        event = _decode(stored)
        assert isinstance(event, events.JobFailed)
        change.error = event.code, _text(event.message), event.task or ""


async def _write(conn: AsyncConnection[Any], changes: _Changes) -> None:
    pgarrays.register(conn)
    new_jobs = [
        (*key, *columns, change.state or "running", *change.columns())
        for key, columns in changes.new_jobs.items()
        for change in (changes.jobs.pop(key, None) or _JobChange(),)
    ]
    changed_jobs = [(*key, change.state or "", *change.columns()) for key, change in changes.jobs.items()]
    steps = [
        (*key, row.owner, row.agent, row.created_position, *counts.values())
        for key, (row, counts) in changes.steps.items()
    ]
    positions = [(*key, at[0], at[-1], at) for key, at in changes.positions.items()]
    new_tasks = [msgspec.structs.astuple(row) for row in changes.new_tasks.values()]
    tasks = [_changes_of(row) for row in changes.tasks.values()]
    async with conn.pipeline(), conn.cursor(binary=True) as cursor:
        for statement, columns, rows in (
            (_INSERT_JOBS, _JOB_COLUMNS + _JOB_CHANGES, new_jobs),
            (_CHANGE_JOBS, _JOB_COLUMNS[:2] + _JOB_CHANGES, changed_jobs),
            (_INSERT_TASKS, _TASK_COLUMNS, new_tasks),
            (_CHANGE_TASKS, _TASK_UPDATED, tasks),
            (_CHANGE_STEPS, _STEP_COLUMNS, steps),
            (_INSERT_POSITIONS, _POSITION_COLUMNS, positions),
        ):
            if rows:
                await cursor.execute(statement, _packed(columns, rows), prepare=True)


# In order of `_TASK_UPDATED`.
_changes_of = operator.attrgetter(*(name for name, _ in _TASK_UPDATED))


def _packed(columns: Columns, rows: list[tuple[Any, ...]]) -> list[bytes]:
    """Return the columns of rows as packed arrays, in order of `columns`."""
    return [_PACK[kind](values) for (_, kind), values in zip(columns, zip(*rows, strict=True), strict=True)]


def _texts(values: Sequence[str]) -> bytes:
    return pgarrays.text_array([_text_element(value) for value in values])


def _arrays(values: Sequence[list[int]]) -> bytes:
    """Return arrays as PostgreSQL reads them from text."""
    return pgarrays.text_array([pgarrays.element(b"{%b}" % ",".join(map(str, one)).encode()) for one in values])


@functools.lru_cache(maxsize=4096)
def _text_element(value: str) -> bytes:
    # Names, states and ids of jobs and executors come again and again.
    return pgarrays.element(value.encode())


_PACK: Final[dict[str, Callable[[Any], bytes]]] = {
    "text": _texts,
    "integer": pgarrays.int_array,
    "bigint": pgarrays.bigint_array,
    "bigint[]": _arrays,
}


def _decode(stored: Stored) -> events.Event | None:
    return None if stored.payload is None else events.decode(stored.type, stored.schema, stored.payload)


def _json(judged: Judged) -> str:
    return msgspec.json.encode(judged).decode()


def _text(message: str) -> str:
    """Return a message as a text column takes it."""
    return message.replace("\x00", "\ufffd")
