"""The record of a decision, and the rule applied to it again.

`recompute` needs nothing but the record. `compare` looks at the values once more, where payloads still exist.
"""

from collections.abc import Iterable, Mapping, Sequence
from itertools import combinations
from typing import Final

import msgspec

from hive_common.contracts.judgement import (
    DECISION_VERSION,
    Candidate,
    Decision,
    Embedding,
    Judge,
    Pair,
    PairCritic,
    Producer,
    Rule,
)
from hive_common.contracts.values import digest_of
from hive_common.judgement.equality import Vector, agreed, alike, comparable, has_keys, key_of
from hive_common.judgement.independence import conflict
from hive_common.judgement.quorum import Decided, Escalate, Extend, Failed, Kept, Outcome, Wait, check_rule, judge
from hive_common.kernel.errors import InvalidArgument

CHOSEN: Final = "chosen by a senior agent"


class Same(msgspec.Struct, frozen=True, tag="same"):
    """What was checked is as the record says."""


class Differs(msgspec.Struct, frozen=True, tag="differs"):
    """The record contradicts itself, or the values."""

    why: tuple[str, ...]


class NotCheckable(msgspec.Struct, frozen=True, tag="not_checkable"):
    """Nothing contradicts the record, and not everything that was asked can be checked."""

    why: tuple[str, ...]


Check = Same | Differs | NotCheckable


def decision_of(
    task: str,
    rule: Rule,
    outcome: Decided | Kept | Escalate | Failed,
    *,
    candidates: Iterable[Candidate] = (),
    pairs: Iterable[Pair] = (),
    judges: Iterable[Judge] = (),
    running: Iterable[Producer] = (),
    coming: int = 0,
    spent: int = 0,
    gone: int = 0,
    chosen: int | None = None,
) -> Decision:
    """Return the record of an outcome, with what `judge` was given, in one order whatever the order was.

    Args:
        gone: so many of `coming`, which nobody is left for, `judge` was told among `spent`.
        chosen: after `Escalate`: which candidate the senior agent took, if any.
    """
    decision = Decision(
        v=DECISION_VERSION,
        task=task,
        rule=rule,
        outcome="failed",
        candidates=tuple(sorted(candidates, key=lambda one: one.attempt)),
        pairs=tuple(sorted(pairs, key=lambda one: (one.a, one.b, one.equal))),
        judges=tuple(sorted(judges, key=lambda one: (one.kind, one.task, one.by.attempt))),
        running=tuple(sorted((Producer(*_place(one)) for one in running), key=lambda one: one.attempt)),
        coming=coming,
        spent=spent,
        gone=gone,
    )
    return msgspec.structs.replace(decision, **_fields(outcome, chosen))


def recompute(decision: Decision) -> Check:
    """Apply the rule again to the recorded votes, scores and verdicts."""
    gone = decision.gone
    if not 0 <= gone <= decision.coming:
        return Differs((f"gone: recorded is {gone}, of {decision.coming} that were to come",))
    try:
        check_rule(decision.rule)
        outcome = judge(
            decision.rule,
            decision.candidates,
            decision.pairs,
            decision.running,
            decision.coming - gone,
            decision.spent + gone,
        )
    except InvalidArgument as error:
        return Differs((error.message,))
    why = [*_against(decision, outcome), *_dependent_judges(decision), *_unnamed_judges(decision)]
    return Differs(tuple(why)) if why else Same()


def compare(
    decision: Decision,
    payloads: Mapping[str, bytes],
    vectors: Mapping[int, Vector] | None = None,
) -> Check:
    """Compare the values again: digests, keys and verdicts on pairs.

    Args:
        payloads: by digest, as far as they still exist.
        vectors: by attempt, for `embedding`.
    """
    rule = decision.rule
    differs: list[str] = []
    gone: list[str] = []
    values: dict[int, bytes] = {}
    for one in decision.candidates:
        payload = payloads.get(one.digest)
        if payload is None:
            gone.append(f"the result of attempt {one.attempt} ({one.digest}) does not exist any more")
        elif digest_of(payload) != one.digest:
            differs.append(f"the payload of attempt {one.attempt} has not the digest {one.digest}")
        else:
            values[one.attempt] = payload
            if rule.k > 1 and has_keys(rule.equal) and key_of(rule.equal, payload) != one.key:
                differs.append(f"attempt {one.attempt} has another key than {one.key}")
    if rule.k > 1 and isinstance(rule.equal, PairCritic):
        gone.append("what is equal was said by a critic, and asking again could give another answer")
    elif rule.k > 1 and not has_keys(rule.equal):
        if isinstance(rule.equal, Embedding):
            missing = (_compared(decision) & values.keys()) - (vectors or {}).keys()
            gone += [f"there is no vector of attempt {one}" for one in sorted(missing)]
        differs += _other_pairs(decision, values, vectors or {})
    if differs:
        return Differs(tuple(differs))
    return NotCheckable(tuple(gone)) if gone else Same()


def self_judged(decision: Decision) -> tuple[tuple[str, int], ...]:
    """Return which agent judged which attempt where it had run, which only `distinct: none` allows."""
    places = {one.attempt: one.executor for one in decision.candidates}
    return tuple(
        (one.agent, attempt)
        for one in decision.judges
        for attempt in one.judged
        if places.get(attempt) == one.by.executor
    )


def _fields(outcome: Decided | Kept | Escalate | Failed, chosen: int | None) -> dict[str, object]:
    match outcome:
        case Decided():
            return {"outcome": "decided", "winner": outcome.winner, "votes": outcome.votes}
        case Kept():
            return {"outcome": "kept", "votes": outcome.votes}
        case Escalate():
            reason = "" if chosen is None else CHOSEN
            return {"outcome": "escalated", "votes": outcome.candidates, "winner": chosen, "reason": reason}
        case Failed():
            return {"outcome": "failed", "reason": outcome.reason}


def _place(one: Producer) -> tuple[int, str, str, str]:
    return one.attempt, one.executor, one.device, one.owner


def _against(decision: Decision, outcome: Outcome) -> list[str]:
    if isinstance(outcome, Wait | Extend):
        return [f"the rule gives no decision yet: {type(outcome).__name__.lower()}"]
    chosen = decision.winner if isinstance(outcome, Escalate) else None
    why = []
    for name, right in _fields(outcome, chosen).items():
        recorded = getattr(decision, name)
        if recorded != right:
            why.append(f"{name}: recorded is {_words(recorded)}, and the rule gives {_words(right)}")
    if isinstance(outcome, Decided) and decision.reason:
        why.append("reason: a decision by votes has none")
    if isinstance(outcome, Failed | Kept) and decision.winner is not None:
        why.append(f"winner: recorded is {decision.winner}, and the rule gives none")
    if isinstance(outcome, Failed) and decision.votes:
        why.append(f"votes: recorded is {_words(decision.votes)}, and the rule gives none")
    if isinstance(outcome, Escalate) and chosen is not None:
        if chosen not in outcome.candidates:
            why.append(f"winner: attempt {chosen} was not among the results that the senior agent was given")
        if not any(one.kind == "senior" for one in decision.judges):
            why.append("judges: a winner was chosen, and it is not said by which senior agent")
    return why


def _words(value: object) -> str:
    return msgspec.json.encode(value).decode()


def _dependent_judges(decision: Decision) -> list[str]:
    """Judges that judged what came from where they ran. A senior agent chooses and is bound by the same."""
    producers = {one.attempt: one for one in decision.candidates}
    why = []
    for one in decision.judges:
        unknown = [attempt for attempt in one.judged if attempt not in producers]
        if unknown:
            why.append(f"judges: {one.agent} judged attempts that are no candidates: {unknown}")
        judged = [producers[attempt] for attempt in one.judged if attempt in producers]
        reason = conflict(decision.rule.distinct, one.by, judged)
        if reason:
            why.append(f"judges: {one.agent} ran on executor {one.by.executor}: {reason}")
    return why


def _unnamed_judges(decision: Decision) -> list[str]:
    """Verdicts that nobody is said to have given."""
    by_kind: dict[str, set[int]] = {}
    for one in decision.judges:
        by_kind.setdefault(one.kind, set()).update(one.judged)
    scored = {one.attempt for one in decision.candidates if one.score is not None}
    tested = {one.attempt for one in decision.candidates if one.passed is not None}
    compared = _compared(decision)
    paired = compared if isinstance(decision.rule.equal, PairCritic) else set()
    turned = compared if isinstance(decision.rule.equal, Embedding) else set()
    why = []
    for kind, judged in (("critic", scored), ("test", tested), ("vector", turned), ("pairs", paired)):
        unnamed = sorted(judged - by_kind.get(kind, set()))
        if unnamed:
            why.append(f"judges: nobody is named for the verdict ({kind}) on attempts {unnamed}")
    return why


def _compared(decision: Decision) -> set[int]:
    """Return the attempts of recorded pairs that are not the same bytes: those needed more than a look."""
    digests = {one.attempt: one.digest for one in decision.candidates}
    different = (pair for pair in agreed(decision.pairs) if digests.get(pair[0]) != digests.get(pair[1]))
    return {attempt for pair in different for attempt in pair}


def _other_pairs(
    decision: Decision, values: Mapping[int, bytes], vectors: Mapping[int, Sequence[float]]
) -> list[str]:
    equal = decision.rule.equal
    known = agreed(decision.pairs)
    forms = {attempt: comparable(equal, payload, vectors.get(attempt)) for attempt, payload in values.items()}
    if isinstance(equal, Embedding):
        forms = {attempt: form for attempt, form in forms.items() if attempt in vectors}
    why = []
    for a, b in combinations(sorted(forms), 2):
        now = values[a] == values[b] or alike(equal, forms[a], forms[b])
        if now != known.get((a, b), values[a] == values[b]):
            why.append(f"attempts {a} and {b} are {'equal' if now else 'not equal'}, and recorded is the contrary")
    return why
