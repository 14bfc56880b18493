"""Joins of steps, made again from the ends of their tasks. Pure but for what it is given.

A step is joined by the rules of `hive_common.judgement.joins` from what its tasks gave, in the order of the fork,
or from what a single task keeps, in the order of its attempts.
"""

from collections.abc import Iterator, Mapping
from typing import Final

import msgspec
from hive_common.contracts.events import (
    AttemptSucceeded,
    StepJoined,
    TaskAssigned,
    TaskDecided,
    TaskFailed,
    TaskSucceeded,
)
from hive_common.contracts.jobdocument import JoinBy, Task
from hive_common.contracts.judgement import CanonicalJson, Equality, Exact, Numeric, Pair
from hive_common.contracts.values import Value, digest_of, inline
from hive_common.judgement.equality import comparable, key_of, pairs_with
from hive_common.judgement.joins import Gathered, Result, gather, rank, vote
from hive_common.kernel.errors import InvalidArgument
from msgspec import UNSET

from hive_audit.decisions import Payloads, digest_of_value
from hive_audit.histories import History
from hive_audit.rules import equality_of, rule_of

TASKS_MAX: Final = 1_000
"""Tasks of a step that is joined again: as many as are voted over."""


def other_join(
    task: Task, joined: StepJoined, position: int, tasks: list[History], payloads: Payloads, gone: list[str]
) -> Iterator[str]:
    """Yield in what a join is another one than its tasks and its job give.

    Args:
        task: the step as the job document has it.
        position: where the join stands; what is behind it was not joined.
        tasks: in the order of the fork.
        gone: is told which values do not exist any more.
    """
    kind, top, equal = _words_of(task)
    if joined.kind != kind:
        yield f"kind: recorded is {joined.kind}, and the job asks for {kind}"
        return
    try:
        found = _gathered(task, joined, position, tasks)
        if not isinstance(found, Gathered):
            yield f"the join: the results that there were are not enough, or not all there: {found}"
            return
        expected = {
            "missing": found.missing,
            "defaulted": found.defaulted,
            "order": tuple(one.index for one in found.results),
        }
        if kind == "rank":
            expected["order"] = rank(found.results, top).order
        elif kind == "vote":
            del expected["order"]
            expected |= _voted(task, found, equal, payloads, gone)
    except InvalidArgument as error:
        yield f"the join: {error.message}"
        return
    for name, right in expected.items():
        said = getattr(joined, name)
        if said != right:
            yield f"{name}: recorded is {_words(said)}, and the rule gives {_words(right)}"
    if found.partial and not joined.partial:
        yield "partial: not everything succeeded, and that is not recorded"


def _words_of(task: Task) -> tuple[str, int | None, Equality]:
    words = task.join
    if not isinstance(words, JoinBy):
        return words, None, CanonicalJson()
    if words.rank is not UNSET:
        return "rank", words.rank.top, CanonicalJson()
    if words.vote is not UNSET:
        return "vote", None, equality_of(words.vote.equal)
    return "integrator", None, CanonicalJson()


def _gathered(task: Task, joined: StepJoined, position: int, tasks: list[History]) -> object:
    if task.fork is None and rule_of(task).keep == "all" and tasks:
        return _kept(tasks[0], joined, position, rule_of(task).of)
    results = [_result(index, history, position) for index, history in enumerate(tasks)]
    size = max(len(tasks), *(number + 1 for number in (*joined.missing, *joined.defaulted)), 0)
    default = inline(msgspec.json.encode(task.default)) if task.on_failure == "default" else None
    return gather(results, size, task.on_failure, task.minimum, default, closing=joined.closed)


def _kept(task: History, joined: StepJoined, position: int, of: int) -> object:
    """Return what a single task keeps."""
    kept = next((event.decision.votes for _, event in task.of(TaskDecided, position)), None)
    if kept is None:
        return "the task was cut short before it was decided"
    attempts = sorted({event.attempt for _, event in task.of(TaskAssigned, position)})
    partial = len(kept) < of
    missing = tuple(number for number in attempts if number not in kept) if partial else ()
    results = tuple(_of_attempt(task, number, number, position) for number in kept)
    return Gathered(results, missing=missing, partial=partial)


def _result(index: int, task: History, position: int) -> Result:
    for _, failed in task.of(TaskFailed, position):
        return Result(index, "failed", code=failed.code)
    for _, ended in task.of(TaskSucceeded, position):
        return _of_attempt(task, ended.attempt, index, position)
    return Result(index, None)


def _of_attempt(task: History, attempt: int, index: int, position: int) -> Result:
    values = {event.attempt: event.output for _, event in task.of(AttemptSucceeded, position)}
    places = {event.attempt: event for _, event in task.of(TaskAssigned, position)}
    scores = {
        one.attempt: one.score for _, event in task.of(TaskDecided, position) for one in event.decision.candidates
    }
    if attempt not in values or attempt not in places:
        raise InvalidArgument(f"task {task.stream}: attempt {attempt} gave no result")
    place = places[attempt]
    return Result(
        index,
        "succeeded",
        value=values[attempt],
        score=scores.get(attempt),
        executor=place.executor,
        device=place.device,
        owner=place.owner,
    )


def _voted(
    task: Task, found: Gathered, equal: Equality, payloads: Payloads, gone: list[str]
) -> Mapping[str, tuple[int, ...]]:
    results = [one for one in found.results if one.index not in found.defaulted]
    if not results:
        return {"order": (), "votes": (), "tied": ()}
    values = [_payload(one.value, payloads) for one in results]
    missing = [one for one, payload in zip(results, values, strict=True) if payload is None]
    gone += [f"result {one.index} does not exist any more" for one in missing]
    if missing or not isinstance(equal, Exact | CanonicalJson | Numeric):
        gone += [] if missing else ["what is equal was said by a model"]
        return {}
    pairs: list[Pair] = []
    forms: dict[int, tuple[str, object]] = {}
    for number, (one, payload) in enumerate(zip(results, values, strict=True)):
        data = payload or b""
        if isinstance(equal, Numeric):
            form = (digest_of(data), comparable(equal, data))
            pairs += pairs_with(equal, one.index, *form, forms)
            forms[one.index] = form
        else:
            results[number] = msgspec.structs.replace(one, key=key_of(equal, data))
    rule = rule_of(task)
    outcome = vote(results, equal, pairs, rule.distinct if rule.of > 1 else "none")
    assert not isinstance(outcome, tuple), "nobody is asked about pairs of these rules"
    return {"order": (outcome.winner,), "votes": outcome.votes, "tied": outcome.tied}


def _payload(value: Value | None, payloads: Payloads) -> bytes | None:
    return None if value is None else payloads.get(digest_of_value(value))


def _words(value: object) -> str:
    return msgspec.json.encode(value).decode()
