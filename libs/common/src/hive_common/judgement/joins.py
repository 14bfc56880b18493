"""What becomes of the results of a fork: all of them, ranked, voted over, or given to an integrator.

First `gather` says whether there is enough to join; then one of the joins looks at what was gathered. Nothing
depends on the order in which tasks ended: results stand in the order of the fork.

Source for `vote`: X. Wang et al., Self-Consistency Improves Chain of Thought Reasoning in Language Models, 2022.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from typing import Literal

import msgspec

from hive_common.contracts.judgement import Candidate, Distinct, Equality, Pair, PairCritic, Rule
from hive_common.contracts.values import Value
from hive_common.judgement.quorum import Votes
from hive_common.kernel.errors import InvalidArgument

OnFailure = Literal["fail", "skip", "default"]
TaskEnd = Literal["succeeded", "failed", "cancelled"]


class Result(msgspec.Struct, frozen=True, omit_defaults=True):
    """One task of the fork. `status` is None while it has not ended.

    Attributes:
        score: what a critic gave, or the task's own output where the join ranks by it.
        key: of its value (`hive_common.judgement.equality.key_of`), where results are voted over by keys.
    """

    index: int
    status: TaskEnd | None
    value: Value | None = None
    score: float | None = None
    code: str = ""
    executor: str = ""
    device: str = ""
    owner: str = ""
    key: str = ""


class Gathered(msgspec.Struct, frozen=True, omit_defaults=True, tag="gathered"):
    """What goes into the join, in the order of the fork.

    Attributes:
        results: those that succeeded, and under `default` those that take the default's place.
        defaulted: indexes of the latter.
        missing: indexes of which there is nothing.
        partial: whether anything is missing or defaulted.
    """

    results: tuple[Result, ...]
    defaulted: tuple[int, ...] = ()
    missing: tuple[int, ...] = ()
    partial: bool = False


class Waiting(msgspec.Struct, frozen=True, tag="waiting"):
    """Tasks have not ended, and what there is cannot end the join yet."""

    open: int


class NotEnough(msgspec.Struct, frozen=True, tag="not_enough"):
    """The join fails. `index` is the task that did it, the first in the order of the fork."""

    code: str
    message: str
    index: int | None = None


class Ranked(msgspec.Struct, frozen=True, tag="ranked"):
    """Indexes from the best score down; `unscored` come last, in the order of the fork."""

    order: tuple[int, ...]
    unscored: tuple[int, ...]


class Voted(msgspec.Struct, frozen=True, omit_defaults=True, tag="voted"):
    """What most results are equal to.

    Attributes:
        winner: an index; of answers with as many votes the first in the order of the fork.
        votes: indexes that voted for it.
        tied: the first index of every answer that has as many votes, the winner's too; empty without a tie.
        majority: more than half of all that may vote.
    """

    winner: int
    votes: tuple[int, ...]
    tied: tuple[int, ...] = ()
    majority: bool = False


class Given(msgspec.Struct, frozen=True, omit_defaults=True):
    """One result as an integrator is given it: a value, or why there is none."""

    index: int
    status: Literal["succeeded", "failed", "cancelled", "missing", "default"]
    value: Value | None = None
    score: float | None = None
    code: str = ""


class Integration(msgspec.Struct, frozen=True):
    """What an integrator is given. `partial`: not every task of the fork succeeded."""

    results: tuple[Given, ...]
    partial: bool
    succeeded: int
    size: int


def gather(
    results: Collection[Result],
    size: int,
    on_failure: OnFailure = "fail",
    minimum: int = 0,
    default: Value | None = None,
    closing: bool = False,
) -> Gathered | Waiting | NotEnough:
    """Say what a join may see.

    Args:
        results: of the fork, in any order; tasks that are not there have not ended.
        size: of the fork.
        on_failure: `fail`: one task that did not succeed fails the join; `skip`: it is left out; `default`: the
            `default` takes its place.
        minimum: results that have to have succeeded, whatever `on_failure` says.
        closing: the deadline was reached: what has not ended is missing, and nothing is waited for. Under `fail` it
            is left out as under `skip`, for there a join is asked what it makes of what there is.
    """
    by_index = {one.index: one for one in results}
    if len(by_index) != len(results) or not all(0 <= index < size for index in by_index):
        raise InvalidArgument(f"results: expected each index below {size} once at most", path="results")
    ended = [one for _, one in sorted(by_index.items()) if one.status is not None]
    good = [one for one in ended if one.status == "succeeded"]
    bad = [one for one in ended if one.status != "succeeded"]
    still = size - len(ended)
    if on_failure == "fail" and bad:
        first = bad[0]
        return NotEnough(first.code or "failed", f"task {first.index} of the fork {first.status}", first.index)
    if len(good) + (0 if closing else still) < minimum:
        return NotEnough("too_few_results", f"{len(good)} results of {size}, and {minimum} are the least")
    if still and not closing:
        return Waiting(still)
    there = {one.index: one for one in good}
    absent = tuple(index for index in range(size) if index not in there)
    if on_failure == "default":
        there |= {index: Result(index, "succeeded", default) for index in absent}
    return Gathered(
        results=tuple(one for _, one in sorted(there.items())),
        defaulted=absent if on_failure == "default" else (),
        missing=absent if on_failure != "default" else (),
        partial=bool(absent),
    )


def rank(results: Iterable[Result], top: int | None = None) -> Ranked:
    """Order results by score, the best first; those of one score stay in the order of the fork."""
    scored: list[tuple[float, int]] = []
    unscored: list[int] = []
    for one in results:
        if one.score is None or not math.isfinite(one.score):
            unscored.append(one.index)
        else:
            scored.append((-one.score, one.index))
    order = (*(index for _, index in sorted(scored)), *sorted(unscored))
    return Ranked(order[:top], tuple(sorted(set(order[:top]) & set(unscored))))


def vote(
    results: Sequence[Result],
    equal: Equality,
    pairs: Iterable[Pair] = (),
    distinct: Distinct = "none",
) -> Voted | tuple[tuple[int, int], ...]:
    """Return the answer that most results give, or under `critic` the pairs that it has to judge first.

    Votes are counted as in a quorum (`hive_common.judgement.quorum`): each is equal to the winner itself.

    Args:
        results: one or more, as `gather` gave them, without defaults, which are nobody's answer.
        pairs: of indexes, where `equal` goes by pairs.
        distinct: results of one owner, device or executor are one vote.

    Raises:
        InvalidArgument: there is no result.
    """
    if not results:
        raise InvalidArgument("results: expected one at least to vote over", path="results")
    candidates = [
        Candidate(one.index, one.executor, one.device, one.owner, digest=_digest(one), key=one.key)
        for one in results
    ]
    votes = Votes(Rule(k=2, of=2, equal=equal, distinct=distinct), candidates, pairs)
    if isinstance(equal, PairCritic) and votes.unknown_pairs:
        return votes.unknown_pairs
    leaders = votes.leaders()
    voters = votes.voters(leaders[0])
    return Voted(
        winner=leaders[0],
        votes=voters,
        tied=tuple(leaders) if len(leaders) > 1 else (),
        majority=2 * len(voters) > votes.electorate,
    )


def integration(results: Collection[Result], size: int, gathered: Gathered) -> Integration:
    """Return what an integrator is given: every task of the fork, those without a result with the reason."""
    by_index = {one.index: one for one in results}
    good = {one.index: one for one in gathered.results}
    defaulted = frozenset(gathered.defaulted)
    given: list[Given] = []
    for index in range(size):
        one = by_index.get(index)
        code = "" if one is None else one.code
        if index in defaulted:
            given.append(Given(index, "default", good[index].value, code=code))
        elif index in good:
            given.append(Given(index, "succeeded", good[index].value, good[index].score))
        else:
            given.append(Given(index, "missing" if one is None or one.status is None else one.status, code=code))
    return Integration(tuple(given), gathered.partial, len(good) - len(defaulted), size)


def _digest(result: Result) -> str:
    return "" if result.value is None or result.value.digest is None else result.value.digest
