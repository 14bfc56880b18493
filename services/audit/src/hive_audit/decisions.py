"""Whether a decision over a task follows from what else the log says of it.

The record of a decision holds all that its rule went by. Here the record is held against the events that it was
made from: who gave which result where, what judges were asked and answered, and how the task ended. Pure: events go
in, and what contradicts the record comes out, in words.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import msgspec
from hive_common.contracts.events import (
    AttemptFailed,
    AttemptLost,
    AttemptSucceeded,
    TaskAssigned,
    TaskCreated,
    TaskDecided,
    TaskExtended,
    TaskFailed,
    TaskSucceeded,
)
from hive_common.contracts.judgement import Candidate, CanonicalJson, Decision, Judge, Pair, PairCritic, Producer
from hive_common.contracts.values import Value, digest_of
from hive_common.judgement.equality import Vector, key_of

from hive_audit.histories import History

_REPLACING: Final = frozenset({"retry", "lost"})
_JUDGED_BY: Final = {
    "critic": "score",
    "test": "passed",
    "vector": "vector",
    "pairs": "equal",
    "senior": "choice",
}

Payloads = Mapping[str, bytes]
"""By digest, as far as they still exist."""


def digest_of_value(value: Value) -> str:
    """Return the digest of a value's bytes, wherever they are."""
    return value.digest or digest_of(value.raw or b"")


def contradictions(
    decided: TaskDecided, position: int, task: History, judges: Mapping[str, History], payloads: Payloads
) -> Iterator[str]:
    """Yield what the log says otherwise.

    Args:
        position: where the decision stands; what is behind it did not lead to it.
        task: the judged task.
        judges: by the id of their task, as far as the log has them.
        payloads: of inputs and outputs that are not inline.
    """
    decision = decided.decision
    if decision.task != task.stream:
        yield f"task: recorded is {decision.task}, and the decision stands in the stream of {task.stream}"
    yield from _results(decision, position, task)
    yield from _attempts(decision, position, task)
    yield from _judges(decision, position, task, judges, payloads)
    yield from _verdicts(decision, judges, payloads)
    yield from _end(decision, position, task)


# --- attempts ----------------------------------------------------------------------------------------------


def _results(decision: Decision, position: int, task: History) -> Iterator[str]:
    """Check who gave which result."""
    outputs = {event.attempt: event.output for _, event in task.of(AttemptSucceeded, position)}
    places = _places(task, position)
    candidates = {one.attempt: one for one in decision.candidates}
    for attempt in sorted(outputs.keys() - candidates.keys()):
        yield f"candidates: attempt {attempt} succeeded before the decision and is none"
    for attempt, one in candidates.items():
        if attempt not in outputs:
            yield f"candidates: attempt {attempt} did not succeed before the decision"
            continue
        digest = digest_of_value(outputs[attempt])
        if one.digest != digest:
            yield f"candidates: attempt {attempt} gave {digest}, and recorded is {one.digest}"
        yield from _place(f"candidates: attempt {attempt}", one, places.get(attempt))


def _attempts(decision: Decision, position: int, task: History) -> Iterator[str]:
    """Check the attempts without a result: those that ran, those to come, and those that gave none."""
    places = _places(task, position)
    ended = {event.attempt for _, event in task.of(AttemptSucceeded, position)}
    without = {event.attempt for _, event in task.of(AttemptFailed, position)}
    without |= {event.attempt for _, event in task.of(AttemptLost, position)}
    running = places.keys() - ended - without
    recorded = {one.attempt: one for one in decision.running}
    if recorded.keys() != running:
        yield f"running: recorded are {sorted(recorded)}, and the attempts that ran were {sorted(running)}"
    for attempt in sorted(recorded.keys() & running):
        yield from _place(f"running: attempt {attempt}", recorded[attempt], places[attempt])
    extensions = [event for _, event in task.of(TaskExtended, position)]
    planned = sum(event.replicas for _, event in task.of(TaskCreated)) + sum(one.attempts for one in extensions)
    replaced = sum(one.attempts for one in extensions if one.reason in _REPLACING)
    for name, was, said in (
        ("coming", planned - len(places), decision.coming),
        ("spent", len(without) - replaced, decision.spent),
    ):
        if was != said:
            yield f"{name}: recorded is {said}, and by the log it was {was}"


def _places(task: History, before: int | None = None) -> dict[int, Producer]:
    return {
        event.attempt: Producer(event.attempt, event.executor, event.device, event.owner)
        for _, event in task.of(TaskAssigned, before)
    }


def _place(what: str, recorded: Producer, assigned: Producer | None) -> Iterator[str]:
    if assigned is None:
        yield f"{what} was never assigned"
        return
    for name in ("executor", "device", "owner"):
        said, was = getattr(recorded, name), getattr(assigned, name)
        if said != was:
            yield f"{what}: its {name} was {was or 'not known'}, and recorded is {said or 'none'}"


# --- judges ------------------------------------------------------------------------------------------------


def _judges(
    decision: Decision, position: int, task: History, judges: Mapping[str, History], payloads: Payloads
) -> Iterator[str]:
    """Check that each judge was asked what is said, gave its answer before, and where it ran."""
    results = {one.attempt: payloads.get(one.digest) for one in decision.candidates}
    for one in decision.judges:
        history = judges.get(one.task)
        created = next((event for _, event in history.of(TaskCreated)), None) if history else None
        if history is None or created is None:
            yield f"judges: there is no task {one.task} of {one.agent}"
            continue
        at = f"judges: {one.agent} ({one.kind}, task {one.task})"
        asked = created.judging
        if asked is None or (asked.kind, asked.task, asked.attempts) != (one.kind, task.stream, one.judged):
            yield f"{at} was asked something else: {_words(asked)}"
        if (created.agent, created.job) != (one.agent, task.job):
            yield f"{at} is of agent {created.agent} and job {created.job}"
        ends = [(where, event) for where, event in history.of(TaskSucceeded) if where < position]
        if not ends or ends[0][1].attempt != one.by.attempt:
            yield f"{at}: attempt {one.by.attempt} had not decided it"
            continue
        yield from _place(at, one.by, _places(history).get(one.by.attempt))
        given = _bytes(created.input, payloads)
        if given is not None:
            yield from _given(at, one, given, results)


def _given(at: str, judge: Judge, given: bytes, results: Mapping[int, bytes | None]) -> Iterator[str]:
    """Check that a judge was given the very results that are recorded."""
    said = _parsed(given)
    outputs = _outputs(judge.kind, said) if isinstance(said, dict) else None
    if not isinstance(outputs, list) or len(outputs) != len(judge.judged):
        yield f"{at} was not given the results that it judged"
        return
    for attempt, output in zip(judge.judged, outputs, strict=True):
        payload = results.get(attempt)
        if payload is not None and _key(msgspec.json.encode(output)) != _key(payload):
            yield f"{at} was given something else than the result of attempt {attempt}"


def _outputs(kind: str, said: dict[str, Any]) -> Any:
    match kind:
        case "pairs":
            return [said.get("a"), said.get("b")]
        case "senior":
            return said.get("candidates")
    return [said["output"]] if "output" in said else None


def _verdicts(decision: Decision, judges: Mapping[str, History], payloads: Payloads) -> Iterator[str]:
    """Check scores, tests, pairs and the choice against what the judges answered."""
    scores: dict[int, Any] = {}
    passed: dict[int, Any] = {}
    pairs: list[tuple[int, int, Any]] = []
    unread: set[tuple[str, tuple[int, ...]]] = set()
    for one in decision.judges:
        answer = _answer(one, judges.get(one.task), payloads)
        if answer is None:
            unread.add((one.kind, one.judged))
            continue
        said = answer.get(_JUDGED_BY[one.kind])
        match one.kind:
            case "critic":
                scores[one.judged[0]] = said
            case "test":
                passed[one.judged[0]] = said
            case "pairs" if len(one.judged) == 2:
                pairs.append((*one.judged, said))
            case "senior":
                yield from _choice(decision, one, said)
    for candidate in decision.candidates:
        for kind, name, answers in (("critic", "score", scores), ("test", "passed", passed)):
            if (kind, (candidate.attempt,)) not in unread:
                yield from _said_of(candidate, name, answers)
    if isinstance(decision.rule.equal, PairCritic):
        recorded = {_pair_of(pair) for pair in decision.pairs}
        for pair in sorted(recorded ^ {*pairs}, key=str):
            if ("pairs", pair[:2]) not in unread:
                where = "recorded" if pair in recorded else "answered"
                yield f"pairs: attempts {pair[0]} and {pair[1]}: equal {_words(pair[2])} was only {where}"


def vectors_of(decision: Decision, judges: Mapping[str, History], payloads: Payloads) -> dict[int, Vector]:
    """Return the vectors that judges made of results, by attempt; what is none is not among them."""
    found: dict[int, Vector] = {}
    for one in decision.judges:
        if one.kind == "vector" and one.judged:
            said = (_answer(one, judges.get(one.task), payloads) or {}).get(_JUDGED_BY[one.kind])
            try:
                found[one.judged[0]] = msgspec.convert(said, tuple[float, ...])
            except msgspec.ValidationError:
                continue
    return found


def _pair_of(pair: Pair) -> tuple[int, int, Any]:
    return pair.a, pair.b, pair.equal


def _said_of(candidate: Candidate, name: str, answers: Mapping[int, Any]) -> Iterator[str]:
    recorded, said = getattr(candidate, name), answers.get(candidate.attempt)
    if recorded != said:
        yield f"{name}: attempt {candidate.attempt} was given {_words(said)}, and recorded is {_words(recorded)}"


def _choice(decision: Decision, judge: Judge, said: Any) -> Iterator[str]:
    fits = isinstance(said, int) and not isinstance(said, bool) and 0 <= said < len(judge.judged)
    chosen = judge.judged[said] if fits else None
    if chosen != decision.winner:
        yield f"winner: the senior agent chose {_words(chosen)}, and recorded is {_words(decision.winner)}"


def _answer(judge: Judge, history: History | None, payloads: Payloads) -> dict[str, Any] | None:
    """Return what a judge answered; None where its answer does not exist, or is not for this program."""
    for _, event in history.of(AttemptSucceeded) if history else ():
        if event.attempt == judge.by.attempt:
            data = _bytes(event.output, payloads)
            said = None if data is None else _parsed(data)
            return said if isinstance(said, dict) else None
    return None


# --- the end -----------------------------------------------------------------------------------------------


def _end(decision: Decision, position: int, task: History) -> Iterator[str]:
    """Check that the task ended as was decided."""
    taken = decision.winner if decision.outcome != "kept" else next(iter(decision.votes), None)
    ends = [event for where, event in task.of(TaskSucceeded) if where > position]
    failures = [event for where, event in task.of(TaskFailed) if where > position]
    if decision.outcome == "failed" or taken is None:
        codes = {decision.reason or "no_quorum"}
        if not decision.candidates:
            codes |= {event.code for _, event in task.of(AttemptFailed, position)} | {"lost"}
        if not failures:
            yield "the end: nothing was decided, and the task did not fail"
        elif failures[0].code not in codes:
            yield f"the end: the task failed with {failures[0].code}, and decided was {' or '.join(sorted(codes))}"
    elif not ends:
        yield f"the end: attempt {taken} won, and the task did not succeed"
    elif ends[0].attempt != taken:
        yield f"the end: attempt {taken} won, and the task took attempt {ends[0].attempt}"


def _bytes(value: Value | None, payloads: Payloads) -> bytes | None:
    if value is None:
        return None
    return payloads.get(value.digest) if value.digest is not None else value.raw


def _parsed(data: bytes) -> Any:
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, RecursionError):
        return None


def _key(data: bytes) -> str:
    return key_of(CanonicalJson(), data)


def _words(value: object) -> str:
    return "nothing" if value is None else msgspec.json.encode(value).decode()
