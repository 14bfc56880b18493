"""Decisions over tasks and joins of steps, checked again: the rule, the values, and the events they came from."""

import asyncio
from collections.abc import AsyncIterator, Iterable
from typing import Final, Literal

import msgspec
from hive_common.artifacts.store import ArtifactStore
from hive_common.contracts.events import AttemptSucceeded, JobSubmitted, StepJoined, TaskCreated, TaskDecided
from hive_common.contracts.judgement import Decision
from hive_common.contracts.limits import MIB
from hive_common.contracts.values import Value
from hive_common.judgement.record import Check, Differs, NotCheckable, Same, compare, recompute
from hive_common.kernel.errors import Internal, NotFound
from hive_common.kernel.ids import derive_child_id

from hive_audit.decisions import contradictions, digest_of_value, vectors_of
from hive_audit.histories import History, history_of
from hive_audit.joins import TASKS_MAX, other_join
from hive_audit.log_source import LogSource
from hive_audit.rules import judges_other_than, other_than, task_of

PAYLOADS_BYTES_MAX: Final = 64 * MIB
"""Blobs that are read for one decision; what is beyond is not checkable here."""
PAGE_POSITIONS: Final = 10_000


class DecisionCheck(msgspec.Struct, frozen=True):
    """What came of checking one decision, or one join of a step.

    Attributes:
        task: empty for a join.
        position: where it stands in the log.
        outcome: of a join `joined`.
        reasons: what differs, or what cannot be checked any more.
    """

    task: str
    job: str
    step: str
    position: int
    outcome: str
    result: Literal["same", "differs", "not_checkable"]
    reasons: tuple[str, ...] = ()


async def check_decision(source: LogSource, store: ArtifactStore, task_id: str) -> DecisionCheck:
    """Check the decision over a task.

    Raises:
        NotFound: there is no such task, or nothing was decided over it.
        Unavailable: Postgres or the store of artifacts cannot be reached.
    """
    task = await history_of(source, task_id)
    created = next((event for _, event in task.of(TaskCreated)), None)
    decided = [*task.of(TaskDecided)]
    if not task.said and not task.wrong:
        raise NotFound(f"there is no task {task_id[:80]}", task=task_id[:80])
    if not decided or created is None:
        if task.wrong:
            return DecisionCheck(task_id, task.job, "", 0, "", "differs", task.wrong)
        raise NotFound(
            f"nothing was decided over task {task_id[:80]}: its results are not judged, or it ended before",
            task=task_id[:80],
        )
    position, event = decided[0]
    why = [*task.wrong, *(f"position {other}: a second decision" for other, _ in decided[1:])]
    check = await _check(source, store, task, created, position, event, why)
    return DecisionCheck(task_id, created.job, created.step, position, event.decision.outcome, *_result(check))


async def decisions(
    source: LogSource, store: ArtifactStore, job_id: str, after: int, limit: int
) -> AsyncIterator[DecisionCheck]:
    """Check decisions and joins in order of their positions, of one job or of the whole log.

    Args:
        job_id: empty for all jobs.
        after: those behind this position.
        limit: so many at most.

    Raises:
        NotFound: there is no such job.
    """
    head = await source.head()
    until = head.position if head else 0
    if job_id:
        rows = await source.stream(job_id, 1)
        if not rows:
            raise NotFound(f"there is no job {job_id[:80]}", job=job_id[:80])
        after = max(after, rows[0][0])
    found = 0
    while after < until and found < limit:
        # By range, since the log has no index of decisions; a page of the table for every few events.
        end = min(after + PAGE_POSITIONS, until)
        for position, stream, type_, event in await source.decided(after, end, PAGE_POSITIONS):
            if job_id in ("", _correlation(event)) and found < limit:
                found += 1
                if type_ == "StepJoined":
                    yield await check_join(source, store, stream, position)
                else:
                    yield await check_decision(source, store, stream)
        after = end


async def check_join(source: LogSource, store: ArtifactStore, job_id: str, position: int) -> DecisionCheck:
    """Check the join at a position of a job's stream.

    Raises:
        Unavailable: Postgres or the store of artifacts cannot be reached.
    """
    job = await history_of(source, job_id)
    joined = next((event for where, event in job.of(StepJoined) if where == position), None)
    if joined is None:
        return DecisionCheck("", job_id, "", position, "joined", "differs", job.wrong or ("cannot be read",))
    submitted = next((event for _, event in job.of(JobSubmitted)), None)
    try:
        task = task_of(bytes(submitted.document), joined.step) if submitted else None
    except msgspec.DecodeError:
        task = None
    gone: list[str] = []
    why = [*job.wrong]
    if task is None:
        why.append(f"the document of job {job_id} has no task {joined.step}, or cannot be read")
    else:
        tasks = await _tasks_of(source, job_id, joined.step, position)
        for one in tasks:
            why += one.wrong
        if len(tasks) > TASKS_MAX:
            gone.append(f"the join is of more than {TASKS_MAX} tasks")
        else:
            values = [event.output for one in tasks for _, event in one.of(AttemptSucceeded, position)]
            payloads, too_large, damaged = await _payloads(store, values if joined.kind == "vote" else ())
            gone += too_large
            why += damaged
            why += await asyncio.to_thread(lambda: [*other_join(task, joined, position, tasks, payloads, gone)])
    check: Check = Differs(tuple(dict.fromkeys(why))) if why else NotCheckable(tuple(gone)) if gone else Same()
    return DecisionCheck("", job_id, joined.step, position, "joined", *_result(check))


async def _tasks_of(source: LogSource, job_id: str, step: str, position: int) -> list[History]:
    """Return the tasks of a step in the order of its fork, `TASKS_MAX` and one more at most.

    The id of a task follows from its job, its step and its place.
    """
    found: list[History] = []
    while len(found) <= TASKS_MAX:
        task = await history_of(source, derive_child_id(job_id, step, str(len(found))))
        if not task.said or task.said[0].position > position:
            break
        found.append(task)
    return found


class _Envelope(msgspec.Struct):
    correlation: str = ""


def _correlation(event: bytes) -> str:
    try:
        return msgspec.json.decode(event, type=_Envelope).correlation
    except msgspec.DecodeError:
        return ""


async def _check(
    source: LogSource,
    store: ArtifactStore,
    task: History,
    created: TaskCreated,
    position: int,
    decided: TaskDecided,
    why: list[str],
) -> Check:
    decision = decided.decision
    judges = {one.task: await history_of(source, one.task) for one in decision.judges}
    for judge in judges.values():
        why += judge.wrong
    why += await _words_of_job(source, created, decided)
    values = [event.output for _, event in task.of(AttemptSucceeded, position)]
    for judge in judges.values():
        values += [event.output for _, event in judge.of(AttemptSucceeded)]
        values += [event.input for _, event in judge.of(TaskCreated) if event.input is not None]
    payloads, gone, damaged = await _payloads(store, values)
    return await asyncio.to_thread(_judge, decided, position, task, judges, payloads, [*why, *damaged], gone)


def _judge(
    decided: TaskDecided,
    position: int,
    task: History,
    judges: dict[str, History],
    payloads: dict[str, bytes],
    why: list[str],
    gone: list[str],
) -> Check:
    decision = decided.decision
    why += contradictions(decided, position, task, judges, payloads)
    missing = [*gone]
    for check in (recompute(decision), compare(decision, payloads, vectors_of(decision, judges, payloads))):
        if isinstance(check, Differs):
            why += check.why
        elif isinstance(check, NotCheckable):
            missing += check.why
    if why:
        return Differs(tuple(dict.fromkeys(why)))
    missing += _unread(decision, judges, payloads)
    return NotCheckable(tuple(dict.fromkeys(missing))) if missing else Same()


def _unread(decision: Decision, judges: dict[str, History], payloads: dict[str, bytes]) -> Iterable[str]:
    """Name what judges were given or answered that does not exist any more."""
    for one in decision.judges:
        for _, created in judges[one.task].of(TaskCreated):
            if created.input is not None and digest_of_value(created.input) not in payloads:
                yield f"what {one.agent} ({one.kind}, task {one.task}) was given does not exist any more"
        for _, event in judges[one.task].of(AttemptSucceeded):
            if event.attempt == one.by.attempt and digest_of_value(event.output) not in payloads:
                yield f"what {one.agent} ({one.kind}, task {one.task}) answered does not exist any more"


async def _words_of_job(source: LogSource, created: TaskCreated, decided: TaskDecided) -> list[str]:
    job = await history_of(source, created.job)
    submitted = next((event for _, event in job.of(JobSubmitted)), None)
    if submitted is None:
        return [*job.wrong, f"there is no job {created.job}"]
    try:
        task = task_of(bytes(submitted.document), created.step)
    except msgspec.DecodeError as error:
        return [*job.wrong, f"the document of job {created.job} cannot be read: {error}"]
    if task is None:
        return [*job.wrong, f"job {created.job} has no task {created.step}"]
    rule = other_than(task, decided.decision.rule, decided.trust)
    return [*job.wrong, *rule, *judges_other_than(task, decided.decision.judges)]


async def _payloads(store: ArtifactStore, values: Iterable[Value]) -> tuple[dict[str, bytes], list[str], list[str]]:
    """Return payloads by digest as far as they exist, what is too large to be looked at, and what is damaged."""
    payloads: dict[str, bytes] = {}
    gone: list[str] = []
    damaged: list[str] = []
    read = 0
    for value in values:
        if value.raw is not None:
            payloads[digest_of_value(value)] = value.raw
            continue
        digest = value.digest or ""
        if digest in payloads:
            continue
        try:
            size = await store.size(digest)
            if read + size > PAYLOADS_BYTES_MAX:
                gone.append(f"{digest} is not compared: payloads of more than {PAYLOADS_BYTES_MAX} bytes in all")
                continue
            payloads[digest] = await store.get(digest)
            read += size
        except NotFound:
            continue  # who needs it says so, in words of its own
        except Internal as error:
            damaged.append(error.message)
    return payloads, gone, damaged


def _result(check: Check) -> tuple[Literal["same", "differs", "not_checkable"], tuple[str, ...]]:
    match check:
        case Differs():
            return "differs", check.why
        case NotCheckable():
            return "not_checkable", check.why
        case Same():
            return "same", ()
