"""What becomes of the results of a step: `join`, `on_failure`, `minimum`, and the time at which it is closed.

The rules themselves are `hive_common.judgement.joins`. A step that has any of these words is joined once, by
`StepJoined`, when all its tasks have ended; only then do others read it. A step that has an integrator, or does not
fail with its tasks, is closed before the job's deadline: what has not ended by then is cancelled (`partial`), and
it is joined with what there is. So is what only such a step was waiting for (`abandoned`).

Numbers in `StepJoined` are places in the fork. Those of a single task that keeps all are attempts.
"""

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TYPE_CHECKING, Final, Literal

import msgspec
from hive_common.contracts import values
from hive_common.contracts.events import (
    AgentRef,
    Event,
    JobFailed,
    Judging,
    StepJoined,
    TaskCancelled,
    TaskCreated,
    TaskFailed,
)
from hive_common.contracts.judgement import Candidate, CanonicalJson, Distinct, Equality, Exact, Numeric, Pair
from hive_common.contracts.values import Value, digest_of
from hive_common.judgement.equality import Comparable, comparable, key_of, pairs_with
from hive_common.judgement.joins import (
    Gathered,
    Given,
    Integration,
    NotEnough,
    Result,
    Waiting,
    gather,
    integration,
    rank,
    vote,
)
from hive_common.judgement.quorum import sift
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.ids import derive_child_id

from hive_scheduler.domain import task as tasks
from hive_scheduler.domain.jobfile import JobSpec, Step
from hive_scheduler.domain.task import TaskState

if TYPE_CHECKING:
    from hive_scheduler.domain.job import Decision, Inputs, JobState, StepState

PARTIAL: Final = "partial"
"""Why a task is cancelled when its step is closed."""
INTEGRATOR: Final = "integrator"
TOO_FEW: Final = "too_few_results"

RESERVE_MIN_MS: Final = 1_000
"""So long before the deadline a step is closed at least, unless that is more than half of the job's time."""
VOTES_MAX: Final = 1_000
PAIRED_MAX: Final = 200
"""Results that are voted over at most, by keys and by pairs: the leader counts them while everybody waits."""

NULL: Final = values.inline(b"null")

Output = Value | list["Output"]
"""The output of a step: a value, or a list of them that is made where somebody reads it."""


def is_joined(step: Step) -> bool:
    """Whether a step is joined by an event; others are complete when all their tasks have succeeded."""
    return step.join.kind != "all" or step.on_failure != "fail" or step.minimum > 0


def is_closed_early(step: Step) -> bool:
    """Whether a step is joined with what there is when the time of its job is running out."""
    return step.join.kind == INTEGRATOR or step.on_failure != "fail"


def is_partial(event: Event) -> bool:
    """Whether an event ends a task so that its step can be joined in time."""
    return isinstance(event, TaskCancelled) and event.reason == PARTIAL


# --- time --------------------------------------------------------------------------------------------------


def reserves_us(spec: JobSpec, agents: dict[str, AgentRef]) -> dict[str, int]:
    """Return how long before the deadline each step is closed that is closed early.

    Unless the job file says it, it is what the integrator may take and the longest chain of tasks that follow; not
    less than `RESERVE_MIN_MS`, and half of the job's time at most.
    """
    after: dict[str, int] = dict.fromkeys((step.id for step in spec.steps), 0)
    found: dict[str, int] = {}
    for step in reversed(spec.steps):
        said = step.join.reserve_ms
        reserve_ms = said if said is not None else after[step.id] + _integrator_ms(step, agents)
        if is_closed_early(step):
            least = reserve_ms if said is not None else max(reserve_ms, RESERVE_MIN_MS)
            found[step.id] = min(least, spec.deadline_ms if said is not None else spec.deadline_ms // 2) * 1_000
        own_ms = step.timeout_ms or agents[step.agent].timeout_ms
        for need in step.needs:
            after[need] = max(after[need], own_ms + reserve_ms)
    return found


def _integrator_ms(step: Step, agents: dict[str, AgentRef]) -> int:
    return agents[step.join.integrator].timeout_ms if step.join.kind == INTEGRATOR else 0


def is_closing(job: "JobState", state: "StepState", now_us: int) -> bool:
    """Whether a step takes no more results and has not been joined yet."""
    if state.joined is not None or not is_closed_early(state.step):
        return False
    return state.closed or now_us >= job.deadline_us - job.reserves_us[state.step.id]


def next_due_us(job: "JobState", after_us: int) -> int:
    """Return when the job next has something to decide because of the time: a step to close, or its deadline."""
    if not job.closers:
        return job.deadline_us
    times = (job.deadline_us - job.reserves_us[one.step.id] for one in job.closers if one.joined is None)
    return min((time for time in times if time > after_us), default=job.deadline_us)


def abandoned(job: "JobState") -> set[str]:
    """Return the steps whose results nobody waits for any more: all that need them were closed without them."""
    if not any(one.joined is not None and one.joined.closed for one in job.closers):
        return set()
    reads = frozenset[str]() if job.spec.output is None else job.spec.output.steps
    needed_by: dict[str, list[str]] = {}
    for step in job.spec.steps:
        for need in step.needs:
            needed_by.setdefault(need, []).append(step.id)
    found: set[str] = set()
    for name, state in reversed(job.steps.items()):
        if state.complete or state.joined is not None or name in reads or name not in needed_by:
            continue
        if all(one in found or job.steps[one].joined is not None for one in needed_by[name]):
            found.add(name)
    return found


# --- what is due -------------------------------------------------------------------------------------------


def close(job: "JobState", state: "StepState", inputs: "Inputs") -> "Iterator[Decision]":
    """Yield what joins a step with what there is. Sets `job.broken` where that is too little.

    Raises:
        BlobsNeeded: results have to be at hand first.
    """
    yield from cancel(state)
    yield from _join(job, state, inputs, True)


def cancel(state: "StepState") -> "Iterator[Decision]":
    """Yield the end of every task of a step that has not ended."""
    from hive_scheduler.domain.job import Decision

    if not state.open:
        return
    for task in chain(state.tasks, state.children, state.judges):
        if not task.ended:
            yield Decision(task.id, tasks.decide(task, tasks.Cancel(PARTIAL)))


def progress(job: "JobState", state: "StepState", inputs: "Inputs") -> "Iterator[Decision]":
    """Yield what joins a step whose tasks have ended. Sets `job.broken` as soon as too few can succeed.

    Raises:
        BlobsNeeded: results have to be at hand first.
    """
    if is_hopeless(state):
        job.broken = _too_few(state)
    elif not (state.open or state.forking or state.size is None or len(state.tasks) < state.size):
        yield from _join(job, state, inputs, False)


def _join(job: "JobState", state: "StepState", inputs: "Inputs", closed: bool) -> "Iterator[Decision]":
    from hive_scheduler.domain.job import Decision

    outcome = _outcome(job, state, inputs, closed)
    if isinstance(outcome, JobFailed):
        job.broken = outcome
    elif outcome is not None:
        yield Decision(job.id, [outcome])
        yield from integrate(job, state, inputs)


def integrate(job: "JobState", state: "StepState", inputs: "Inputs") -> "Iterator[Decision]":
    """Yield the integrator of a step that was joined, unless there is none, or it is there.

    Raises:
        BlobsNeeded: results have to be at hand first, or its input has to be stored.
    """
    from hive_scheduler.domain.job import Decision

    joined, step = state.joined, state.step
    assert joined is not None
    if not joined.task or joined.task in job.tasks:
        return
    given: Value | None = None
    failure: list[TaskFailed] = []
    try:
        given = inputs.integration(job, state)
    except InvalidArgument as error:
        failure = [TaskFailed("invalid_input", error.message)]
    agent = step.join.integrator
    created = TaskCreated(
        job=job.id,
        step=step.id,
        agent=agent,
        input=given,
        timeout_ms=job.agents[agent].timeout_ms,
        retry=step.retry,
        judging=Judging("integrator"),
    )
    yield Decision(joined.task, [created, *failure])


def is_hopeless(state: "StepState") -> bool:
    """Whether fewer tasks of a step can succeed than have to."""
    return state.size is not None and state.joined is None and state.size - state.lost < state.step.minimum


def failure_of(job: "JobState", state: "StepState", now_us: int, inputs: "Inputs") -> JobFailed | None:
    """Return how a step broke its job, if it did, after tasks of it were cancelled for that.

    Raises:
        BlobsNeeded: results have to be at hand first.
    """
    if not state.joins or state.joined is not None:
        return None
    if is_hopeless(state):
        return _too_few(state)
    outcome = _outcome(job, state, inputs, is_closing(job, state, now_us))
    return outcome if isinstance(outcome, JobFailed) else None


def check_size(step: Step, size: int) -> None:
    """Refuse a fork that cannot be joined as its step says.

    Raises:
        InvalidArgument: with `path` in its fields.
    """
    path = step.input.path.removesuffix(".input")
    if size < step.minimum:
        raise InvalidArgument(
            f"{path}.minimum: {step.minimum} tasks have to succeed, and the fork has {size}", path=f"{path}.minimum"
        )
    if step.join.kind != "vote":
        return
    most = VOTES_MAX if isinstance(_equality(step), Exact | CanonicalJson) else PAIRED_MAX
    if size > most:
        raise InvalidArgument(
            f"{path}.join.vote: {size} results would be voted over; expected {most} at most",
            path=f"{path}.join",
            expected=f"a fork of {most} at most",
        )


def _too_few(state: "StepState") -> JobFailed:
    size = len(state.tasks) if state.size is None else state.size
    good = sum(1 for task in state.tasks if task.status == "succeeded")
    ways = {"failed": 0, "cancelled": 0}
    for task in state.tasks:
        if task.status in ways:
            ways[task.status] += 1
    ended = ", ".join(f"{count} {status}" for status, count in ways.items() if count)
    return JobFailed(
        TOO_FEW,
        f"task `{state.step.id}`: {good} of {size} succeeded{ended and f' ({ended})'}, and at least "
        f"{max(state.step.minimum, 1)} had to",
    )


# --- the join itself ---------------------------------------------------------------------------------------


def _outcome(job: "JobState", state: "StepState", inputs: "Inputs", closed: bool) -> StepJoined | JobFailed | None:
    """Return the join of a step whose tasks have ended; None where some have not, for another reason."""
    found = _gathered(state, closed)
    if not isinstance(found, Gathered):
        return _too_few(state) if isinstance(found, NotEnough) else None
    children = state.counts["succeeded"] - sum(1 for task in state.tasks if task.status == "succeeded")
    joined = StepJoined(
        step=state.step.id,
        kind=state.step.join.kind,
        missing=found.missing,
        defaulted=found.defaulted,
        partial=found.partial or children < state.forked or state.size is None,
        closed=closed,
    )
    match state.step.join.kind:
        case "rank":
            return msgspec.structs.replace(joined, order=rank(found.results, state.step.join.top).order)
        case "vote":
            try:
                return _voted(state, found, joined, inputs)
            except InvalidArgument as error:
                return JobFailed("invalid_output", f"task `{state.step.id}`: {error.message}")
        case "integrator":
            joined = msgspec.structs.replace(joined, task=derive_child_id(job.id, state.step.id, INTEGRATOR))
    return msgspec.structs.replace(joined, order=tuple(one.index for one in found.results))


def _voted(state: "StepState", found: Gathered, joined: StepJoined, inputs: "Inputs") -> StepJoined | JobFailed:
    results = [one for one in found.results if one.index not in found.defaulted]
    equal = _equality(state.step)
    joined = msgspec.structs.replace(joined, by=_in_document(equal))
    if not results:
        # Under `default` that is what the step gives; what is left out cannot win.
        return joined if state.step.on_failure == "default" else _too_few(state)
    payloads = _payloads([one.value for one in results if one.value is not None], inputs)
    pairs: list[Pair] = []
    if isinstance(equal, Numeric):
        forms: dict[int, tuple[str, Comparable]] = {}
        for one, payload in zip(results, payloads, strict=True):
            form = (digest_of(payload), comparable(equal, payload))
            pairs += pairs_with(equal, one.index, *form, forms)
            forms[one.index] = form
    else:
        results = [
            msgspec.structs.replace(one, key=key_of(equal, payload))
            for one, payload in zip(results, payloads, strict=True)
        ]
    outcome = vote(results, equal, pairs, _distinct(state.step))
    assert not isinstance(outcome, tuple), "a critic of pairs is refused in the job file"
    return msgspec.structs.replace(joined, order=(outcome.winner,), votes=outcome.votes, tied=outcome.tied)


def _payloads(found: Iterable[Value], inputs: "Inputs") -> list[bytes]:
    """Return the bytes of values; what is missing of them is asked for at once."""
    from hive_scheduler.domain.job import BlobsNeeded

    payloads, missing = [], set[str]()
    for value in found:
        try:
            payloads.append(inputs.payload(value))
        except BlobsNeeded as needed:
            missing |= needed.load
    if missing:
        raise BlobsNeeded(load=frozenset(missing))
    return payloads


def _equality(step: Step) -> Equality:
    assert step.join.equal is not None
    return step.join.equal.rule


def _distinct(step: Step) -> Distinct:
    """Return whose results are one vote: as among replicas, where the step has any."""
    judging = step.judging
    return judging.rule.distinct if judging is not None and judging.rule.of > 1 else "none"


def _in_document(equal: Equality) -> str:
    match equal:
        case Exact():
            return "exact"
        case Numeric():
            words = {"absolute": equal.absolute, "relative": equal.relative}
            said = {name: value for name, value in words.items() if value}
            return msgspec.json.encode({"numeric": said}).decode()
    return "json"


def _gathered(state: "StepState", closed: bool) -> Gathered | Waiting | NotEnough:
    kept = _kept(state)
    if kept:
        task, words = state.tasks[0], state.step.judging
        assert words is not None
        partial = len(kept) < words.rule.of
        missing = tuple(number for number in sorted(task.attempts) if number not in kept) if partial else ()
        return Gathered(tuple(_of_attempt(task, number) for number in kept), missing=missing, partial=partial)
    size = len(state.tasks) if state.size is None else state.size
    step = state.step
    default = values.inline(step.default) if step.on_failure == "default" else None
    return gather(_results(state), size, step.on_failure, step.minimum, default, closing=closed)


def _results(state: "StepState") -> list[Result]:
    return [_of_task(index, task) for index, task in enumerate(state.tasks)]


def _of_task(index: int, task: TaskState) -> Result:
    if task.status == "failed":
        assert task.failure is not None
        return Result(index, "failed", code=task.failure.code)
    if task.decided is None:
        return Result(index, None)  # what was cancelled had not ended
    return msgspec.structs.replace(_of_attempt(task, task.decided), index=index)


def _of_attempt(task: TaskState, number: int) -> Result:
    at, scores = task.attempts[number], {} if task.judged is None else task.judged.scores
    return Result(
        number,
        "succeeded",
        value=task.outputs[number],
        score=scores.get(number),
        executor=at.executor,
        device=at.device,
        owner=at.owner,
    )


def _kept(state: "StepState") -> tuple[int, ...]:
    """Return the attempts that a single task keeps; of one that was cut short, those that were valid by then."""
    words = state.step.judging
    if state.step.fork is not None or words is None or words.rule.keep != "all" or not state.tasks:
        return ()
    task = state.tasks[0]
    if task.status != "cancelled" or task.judged is None:
        return task.kept
    candidates = [
        Candidate(
            number,
            at.executor,
            at.device,
            at.owner,
            score=task.judged.scores.get(number),
            passed=task.judged.passed.get(number),
        )
        for number, at in task.attempts.items()
        if at.status == "succeeded"
    ]
    return tuple(one.attempt for one in sift(words.rule, candidates).valid)


# --- what is read of a step --------------------------------------------------------------------------------


def output_of(state: "StepState") -> Output:
    """Return the output of a step that is complete."""
    joined, step = state.joined, state.step
    if joined is None:
        outputs = [output_of_task(task) for task in state.tasks]
        return outputs if step.fork is not None else outputs[0]
    if joined.task:
        assert state.integrator is not None
        return output_of_task(state.integrator)
    kept, defaulted = _kept(state), frozenset(joined.defaulted)
    found: list[Output] = []
    for number in joined.order:
        if number in defaulted:
            found.append(values.inline(step.default))
        else:
            found.append(state.tasks[0].outputs[number] if kept else output_of_task(state.tasks[number]))
    if joined.kind == "vote" or (step.fork is None and not kept):
        nothing = values.inline(step.default) if step.on_failure == "default" else NULL
        return found[0] if found else nothing
    return found


def single_output_of(state: "StepState") -> Value | None:
    """Return the output of a step that is complete where it is one value, which need not be looked at."""
    joined = state.joined
    if state.step.fork is not None and (joined is None or not (joined.task or joined.kind == "vote")):
        return None
    output = output_of(state)
    return output if isinstance(output, Value) else None


def output_of_task(task: TaskState) -> Output:
    """Return the output of a task that has succeeded: the list of its results where all are kept."""
    output = task.output
    assert output is not None, f"task {task.id} has not succeeded"
    return [task.outputs[attempt] for attempt in task.kept] or output


def integration_of(state: "StepState") -> Integration:
    """Return what the integrator of a step that was joined is given."""
    joined = state.joined
    assert joined is not None
    kept = _kept(state)
    if kept:
        assert state.step.judging is not None
        missing = tuple(Given(number, _ended(state.tasks[0], number)) for number in joined.missing)
        good = (_of_attempt(state.tasks[0], number) for number in kept)
        given = (*(Given(one.index, "succeeded", one.value, one.score) for one in good), *missing)
        ordered = tuple(sorted(given, key=lambda one: one.index))
        return Integration(ordered, joined.partial, len(kept), state.step.judging.rule.of)
    results = {one.index: one for one in _results(state)}
    default, defaulted = values.inline(state.step.default), frozenset(joined.defaulted)
    there = [
        Result(index, "succeeded", default) if index in defaulted else results[index] for index in joined.order
    ]
    gathered = Gathered(tuple(there), joined.defaulted, joined.missing, joined.partial)
    return integration(list(results.values()), len(joined.order) + len(joined.missing), gathered)


def _ended(task: TaskState, number: int) -> Literal["failed", "missing"]:
    """Say of an attempt that is not kept whether it was to no avail, or was not waited for."""
    return "missing" if task.attempts[number].status in ("cancelled", *tasks.LIVE) else "failed"
