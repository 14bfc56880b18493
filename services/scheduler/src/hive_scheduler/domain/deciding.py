"""What is due of a task whose results are judged: judges to ask, more attempts, or the decision.

The rule itself is `hive_common.judgement.quorum`. Here stands what it is given, and what follows from what it says.
Nothing here depends on when it is asked: asked again after a crash, it goes on where the log says it stood.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple, cast

import msgspec
from hive_common.contracts.events import (
    Event,
    Judging,
    RetryPolicy,
    TaskCreated,
    TaskDecided,
    TaskExtended,
    TaskFailed,
    TaskSucceeded,
)
from hive_common.contracts.judgement import (
    Candidate,
    Embedding,
    Exact,
    Judge,
    JudgeKind,
    Numeric,
    Pair,
    Producer,
    Rule,
)
from hive_common.contracts.values import Value, digest_of
from hive_common.judgement.equality import Comparable, Vector, comparable, has_keys, key_of, pair, pairs_with
from hive_common.judgement.quorum import Decided, Escalate, Extend, Failed, Kept, Wait, judge, sift
from hive_common.judgement.record import decision_of
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.ids import derive_child_id

from hive_scheduler.domain import task as tasks
from hive_scheduler.domain import verdicts
from hive_scheduler.domain.judging import Judging as JudgingWords
from hive_scheduler.domain.task import JudgedState, TaskState

if TYPE_CHECKING:
    from hive_scheduler.domain.job import Decision, Inputs, JobState, StepState

JUDGE_ATTEMPTS: Final = 3
"""A judge that failed is tried so often at least: without it, all that was paid for its candidates is lost."""
NO_LONGER_NEEDED: Final = "decided"

JUDGE_FAILED: Final = "judge_failed"
JUDGE_GONE: Final = "lost"
"""A judge that was to run where nobody is left: like one that was lost too often, it is no fault of its agent."""


class Known:
    """Keys and pairs of a task's results, made from values and not kept in the log."""

    def __init__(self) -> None:
        self.digests: dict[int, str] = {}
        self.keys: dict[int, str] = {}
        self.forms: dict[int, tuple[str, Comparable]] = {}
        self.pairs: list[Pair] = []


class _Case(NamedTuple):
    """A task whose results are judged, with what it belongs to and what its job file says of judging."""

    job: "JobState"
    state: "StepState"
    task: TaskState
    judged: JudgedState
    words: JudgingWords
    inputs: "Inputs"


def judge_id_of(judging: Judging) -> str:
    """Return the id that a judge always has, however often its creation is tried."""
    return derive_child_id(judging.task, judging.kind, *(str(attempt) for attempt in judging.attempts))


def producer_of(task: TaskState, attempt: int) -> Producer:
    """Return where an attempt of a judged task, or of a judge, was made."""
    at = task.attempts[attempt]
    return Producer(attempt, at.executor, at.device, at.owner)


def progress(job: "JobState", state: "StepState", task: TaskState, inputs: "Inputs") -> "Iterator[Decision]":
    """Yield what is due of a task; each MUST be applied before the next is asked for.

    Raises:
        BlobsNeeded: results that are blobs have to be at hand first.
    """
    from hive_scheduler.domain.job import Decision

    judged, words = task.judged, state.step.judging
    assert judged is not None and words is not None
    if not task.attempts and not inputs.gone(job, task):
        return
    case = _Case(job, state, task, judged, words, inputs)
    while not task.ended:
        for decision in _progress_open(case):
            yield Decision(*decision)
        judges = state.judges_of.get(task.id, ())
        gone = [one for one in judges if not one.ended and inputs.gone(job, one)]
        if task.ended or not gone:
            break
        for one in gone:
            yield Decision(one.id, [TaskFailed(JUDGE_GONE, "no executor is left that may run it")])
    if task.ended:
        state.known.pop(task.id, None)
        for one in state.judges_of.get(task.id, ()):
            if not one.ended:
                yield Decision(one.id, tasks.decide(one, tasks.Cancel(NO_LONGER_NEEDED)))


def _progress_open(case: _Case) -> Iterator[tuple[str, list[Event]]]:
    job, task, judged, words, inputs = case.job, case.task, case.judged, case.words, case.inputs
    if judged.failure:
        yield task.id, [TaskFailed(JUDGE_FAILED, judged.failure)]
        return
    try:
        rule, trust = words.rule, 0
        candidates, pairs = _known(case, rule)
        alone = words.adaptive and judged.planned - judged.replaced == 1
        gone = inputs.gone(job, task)
        if alone and not candidates and (task.wanted > gone or task.live()):
            return  # whether a second one is wanted depends on whose result this will be
        if alone and len(candidates) == 1 and not task.wanted:
            trusted = inputs.trust(job, task, candidates[0])
            if trusted is None or sift(rule, candidates).out:
                # What a judge has rejected is not taken on trust, either.
                more = rule.k - 1 if rule.on_none == "extend" else rule.of - 1
                yield task.id, [TaskExtended(more, "check")]
                return
            rule, trust = msgspec.structs.replace(rule, k=1, of=1, extend_to=0), trusted
        yield from _apply(case, rule, trust, candidates, pairs, gone)
    except InvalidArgument as error:
        yield task.id, [TaskFailed(JUDGE_FAILED, error.message)]


def _apply(
    case: _Case, rule: Rule, trust: int, candidates: list[Candidate], pairs: list[Pair], gone: int
) -> Iterator[tuple[str, list[Event]]]:
    job, task, judged, words, inputs = case.job, case.task, case.judged, case.words, case.inputs
    running = [producer_of(task, number) for number in task.live()]
    ended = sum(1 for attempt in task.attempts.values() if attempt.status in ("failed", "lost"))
    # Those that nobody is left for will give no more results than those that failed.
    coming, spent = task.wanted - gone, ended - judged.replaced + gone

    outcome = judge(rule, candidates, pairs, running, coming, spent)
    made = len(candidates) + len(running) + coming + spent
    if (
        isinstance(outcome, Failed | Escalate)
        and made < words.rule.of
        and not trust
        and inputs.may_extend(job, task)
    ):
        # The others were to come only if the first is slow, or not trusted; it gave nothing that counts.
        yield task.id, [TaskExtended(1 if words.hedged else words.rule.of - made, "extend")]
        return
    if isinstance(outcome, Extend):
        if inputs.may_extend(job, task):
            yield task.id, [TaskExtended(1, "extend")]
            return
        # Nobody is left who could make an independent one: the rule as it could be applied here.
        rule = msgspec.structs.replace(rule, of=max(rule.k, made), extend_to=0, on_none="fail")
        outcome = judge(rule, candidates, pairs, running, coming, spent)
    if isinstance(outcome, Wait):
        yield from _ask_judges(case, outcome)
        return
    assert not isinstance(outcome, Extend)
    if isinstance(outcome, Escalate) and outcome.candidates and judged.choice is None:
        yield from _ask(case, Judging("senior", task.id, outcome.candidates))
        return
    chosen = judged.choice or None
    record = decision_of(
        task.id,
        rule,
        outcome,
        candidates=candidates,
        pairs=pairs,
        judges=judged.judges,
        running=running,
        coming=task.wanted,
        spent=spent - gone,
        gone=gone,
        chosen=chosen if isinstance(outcome, Escalate) else None,
    )
    end = _end(judged, outcome, chosen, bool(candidates))
    if gone and isinstance(end, TaskFailed):
        unit = "executor" if rule.distinct == "none" else rule.distinct
        why = f"{gone} more {'was' if gone == 1 else 'were'} to come, and no {unit} is left that may run it"
        end = msgspec.structs.replace(end, message=f"{end.message}; {why}")
    yield task.id, [TaskDecided(record, trust), end]


def _end(
    judged: JudgedState, outcome: Decided | Kept | Escalate | Failed, chosen: int | None, any_: bool
) -> TaskSucceeded | TaskFailed:
    match outcome:
        case Decided():
            return TaskSucceeded(outcome.winner)
        case Kept():
            return TaskSucceeded(outcome.votes[0])
        case Escalate() if chosen is not None:
            return TaskSucceeded(chosen)
    last = judged.last
    if not any_ and last is not None:
        return TaskFailed(last[0], last[1])
    if isinstance(outcome, Escalate):
        return TaskFailed("no_quorum", "the results do not agree, and the senior agent took none of them")
    return TaskFailed(outcome.reason, _WHY.get(outcome.reason, outcome.reason))


_WHY: Final = {
    "no_quorum": "too few results agree, and no more attempts are made",
    "contested": "two answers have as many votes",
    "no_valid_result": "no attempt gave a result that passed",
}


# --- judges ------------------------------------------------------------------------------------------------


def _ask_judges(case: _Case, wait: Wait) -> Iterator[tuple[str, list[Event]]]:
    asked: list[tuple[JudgeKind, tuple[int, ...]]] = [("critic", (one,)) for one in wait.scores]
    asked += [("test", (one,)) for one in wait.tests]
    asked += [("vector", (one,)) for one in wait.vectors]
    asked += [("pairs", pair) for pair in wait.pairs]
    for kind, attempts in asked:
        yield from _ask(case, Judging(kind, case.task.id, attempts))


def _ask(case: _Case, judging: Judging) -> Iterator[tuple[str, list[Event]]]:
    job, step = case.job, case.state.step
    stream = judge_id_of(judging)
    if stream in job.tasks:
        return
    assert judging.kind != "integrator"
    agent = case.words.judges[judging.kind]
    yield (
        stream,
        [
            TaskCreated(
                job=job.id,
                step=step.id,
                agent=agent,
                index=case.task.index,
                input=case.inputs.question(job, case.task, judging, agent),
                timeout_ms=job.agents[agent].timeout_ms,
                retry=RetryPolicy(max(JUDGE_ATTEMPTS, step.retry.max_attempts)),
                judging=judging,
            )
        ],
    )


def judge_ended(judge_task: TaskState, task: TaskState) -> None:
    """Take over what a judge said, or that it cannot. For `job.evolve`.

    Raises:
        InvalidArgument: its output is none that a judge may give; a report like that is not accepted.
    """
    judging, judged = judge_task.judging, task.judged
    assert judging is not None and judging.kind != "integrator" and judged is not None
    if judge_task.failure is not None:
        failure = judge_task.failure
        judged.failure = f"{judge_task.agent} ({judging.kind}) failed: {failure.code}: {failure.message}"
    if judge_task.decided is None or judge_task.output is None:
        return
    said = verdicts.read(judging, judge_task.output.raw or b"")
    match judging.kind:
        case "vector":
            if not task.ended:
                judged.vectors[judging.attempts[0]] = cast(Vector, said)
        case "critic":
            judged.scores[judging.attempts[0]] = float(cast(float, said))
        case "test":
            judged.passed[judging.attempts[0]] = bool(said)
        case "pairs":
            a, b = judging.attempts
            judged.pairs.append(pair(a, b, bool(said)))
        case "senior":
            judged.choice = int(cast(int, said))
    by = producer_of(judge_task, judge_task.decided)
    judged.judges.append(Judge(judging.kind, judge_task.agent, judge_task.id, by, judging.attempts))


# --- what is known of results ------------------------------------------------------------------------------


def _known(case: _Case, rule: Rule) -> tuple[list[Candidate], list[Pair]]:
    task, judged, inputs = case.task, case.judged, case.inputs
    known = case.state.known.setdefault(task.id, Known())
    numbers = [number for number, attempt in task.attempts.items() if attempt.status == "succeeded"]
    # Values are looked at where they are compared, and not loaded for nothing.
    looked_at = rule.k > 1
    for number in numbers:
        value = task.outputs[number]
        if number not in known.digests:
            known.digests[number] = _digest_of(value)
        if looked_at and has_keys(rule.equal) and number not in known.keys:
            known.keys[number] = _key(rule, value, known.digests[number], inputs)
    candidates = [_candidate(task, number, judged, known) for number in numbers]
    pairs = [*judged.pairs]
    if looked_at and isinstance(rule.equal, Numeric | Embedding):
        pairs += _pairs_of(case, rule.equal, numbers, known)
    return candidates, pairs


def _candidate(task: TaskState, number: int, judged: JudgedState, known: Known) -> Candidate:
    at = task.attempts[number]
    return Candidate(
        number,
        at.executor,
        at.device,
        at.owner,
        digest=known.digests[number],
        key=known.keys.get(number, ""),
        score=judged.scores.get(number),
        passed=judged.passed.get(number),
    )


def _digest_of(value: Value) -> str:
    return value.digest or digest_of(value.raw or b"")


def _key(rule: Rule, value: Value, digest: str, inputs: "Inputs") -> str:
    if isinstance(rule.equal, Exact) and value.raw is None:
        return digest
    return key_of(rule.equal, inputs.payload(value))


def _pairs_of(case: _Case, equal: Numeric | Embedding, numbers: list[int], known: Known) -> list[Pair]:
    """Compare what came with all that came before it, once. Without its vector, a result has not come yet."""
    task, judged, inputs = case.task, case.judged, case.inputs
    by_vectors = isinstance(equal, Embedding)
    for number in numbers:
        if number not in known.forms and (not by_vectors or number in judged.vectors):
            payload = b"" if by_vectors else inputs.payload(task.outputs[number])
            form = comparable(equal, payload, judged.vectors.get(number))
            known.pairs += pairs_with(equal, number, known.digests[number], form, known.forms)
            known.forms[number] = known.digests[number], form
    return known.pairs
