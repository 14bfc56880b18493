"""Joins see exactly what the rule allows, in the order of the fork."""

from random import Random
from typing import Any

import pytest
from hive_common.contracts.judgement import CanonicalJson, Numeric, Pair, PairCritic
from hive_common.contracts.values import inline
from hive_common.judgement.equality import key_of
from hive_common.judgement.joins import (
    Gathered,
    Given,
    NotEnough,
    Ranked,
    Result,
    Voted,
    Waiting,
    gather,
    integration,
    rank,
    vote,
)
from hive_common.kernel.errors import InvalidArgument
from hypothesis import given, settings
from hypothesis import strategies as st

deterministic = settings(derandomize=True)


def good(index: int, text: bytes = b"1", **fields: Any) -> Result:
    return Result(index, "succeeded", inline(text), key=key_of(CanonicalJson(), text), **fields)


def bad(index: int, code: str = "agent_error") -> Result:
    return Result(index, "failed", code=code)


def test_all_is_everything_in_the_order_of_the_fork() -> None:
    there = [good(2), good(0), good(1)]
    assert gather(there, 3) == Gathered((there[1], there[2], there[0]))
    assert gather(there[:2], 3) == Waiting(1)
    assert gather([], 0) == Gathered(())


def test_one_failure_fails_the_join_at_once_unless_it_is_to_be_left_out() -> None:
    there = [bad(2, "timeout"), good(0)]
    assert gather(there, 3) == NotEnough("timeout", "task 2 of the fork failed", 2)
    assert gather(there, 3, "skip") == Waiting(1)
    assert gather([*there, good(1)], 3, "skip") == Gathered((good(0), good(1)), missing=(2,), partial=True)
    default = inline(b"0")
    joined = gather([*there, good(1)], 3, "default", default=default)
    assert joined == Gathered((good(0), good(1), Result(2, "succeeded", default)), defaulted=(2,), partial=True)


def test_a_minimum_that_cannot_be_met_is_not_waited_for() -> None:
    there = [bad(0), bad(1)]
    assert gather(there, 4, "skip", minimum=2) == Waiting(2)
    assert isinstance(gather([*there, bad(2)], 4, "skip", minimum=2), NotEnough)
    # A default is no result that succeeded.
    assert isinstance(gather([*there, bad(2)], 4, "default", minimum=2, default=inline(b"0")), NotEnough)


def test_at_the_deadline_there_is_what_there_is() -> None:
    there = [good(1), Result(0, None)]
    assert gather(there, 3, closing=True) == Gathered((good(1),), missing=(0, 2), partial=True)
    assert isinstance(gather(there, 3, minimum=2, closing=True), NotEnough)


def test_an_integrator_is_told_what_is_missing_and_why() -> None:
    there = [good(1, score=0.5), bad(0, "timeout"), Result(3, None)]
    gathered = gather(there, 4, "skip", closing=True)
    assert isinstance(gathered, Gathered)
    made = integration(there, 4, gathered)
    assert made.results == (
        Given(0, "failed", code="timeout"),
        Given(1, "succeeded", inline(b"1"), 0.5),
        Given(2, "missing"),
        Given(3, "missing"),
    )
    assert (made.partial, made.succeeded, made.size) == (True, 1, 4)
    defaulted = gather(there, 4, "default", default=inline(b"0"), closing=True)
    assert isinstance(defaulted, Gathered)
    made = integration(there, 4, defaulted)
    assert [one.status for one in made.results] == ["default", "succeeded", "default", "default"]
    assert made.succeeded == 1


def test_a_whole_fork_is_not_partial() -> None:
    there = [good(0), good(1)]
    gathered = gather(there, 2)
    assert isinstance(gathered, Gathered)
    assert not integration(there, 2, gathered).partial


statuses = st.lists(st.sampled_from(["succeeded", "failed", "cancelled", None, "absent"]), max_size=8)


@deterministic
@given(
    statuses,
    st.sampled_from(["fail", "skip", "default"]),
    st.integers(0, 4),
    st.booleans(),
    st.randoms(use_true_random=False),
)
def test_a_join_sees_exactly_what_succeeded(
    drawn: list[Any], on_failure: Any, minimum: int, closing: bool, random: Random
) -> None:
    there = [Result(index, status) for index, status in enumerate(drawn) if status != "absent"]
    succeeded = [one.index for one in there if one.status == "succeeded"]
    failed = any(one.status in ("failed", "cancelled") for one in there)
    made = gather(there, len(drawn), on_failure, minimum, inline(b"0"), closing)
    random.shuffle(there)
    assert gather(there, len(drawn), on_failure, minimum, inline(b"0"), closing) == made
    if isinstance(made, Gathered):
        assert [one.index for one in made.results if one.index not in made.defaulted] == succeeded
        assert len(succeeded) >= minimum
        assert made.partial == (len(succeeded) < len(drawn))
        assert sorted({*succeeded, *made.defaulted, *made.missing}) == list(range(len(drawn)))
        assert not (failed and on_failure == "fail")
        assert closing or (all(one.status is not None for one in there) and len(there) == len(drawn))
        whole = integration(there, len(drawn), made)
        assert [one.index for one in whole.results] == list(range(len(drawn)))
    elif isinstance(made, Waiting):
        assert not closing and made.open > 0
    else:
        assert (on_failure == "fail" and failed) or len(succeeded) < minimum


def test_indexes_stand_there_once_and_within_the_fork() -> None:
    for there in ([good(0), good(0)], [good(2)], [good(-1)]):
        with pytest.raises(InvalidArgument):
            gather(there, 2)


# --- rank --------------------------------------------------------------------------------------------------


def test_the_best_score_comes_first_and_equal_ones_stay_in_order() -> None:
    there = [good(index, score=score) for index, score in enumerate([0.5, 0.9, None, 0.5, float("nan"), 0.9, -1.0])]
    assert rank(there) == Ranked((1, 5, 0, 3, 6, 2, 4), (2, 4))
    assert rank(reversed(there)) == rank(there)
    assert rank(there, top=2) == Ranked((1, 5), ())
    assert rank(there, top=6) == Ranked((1, 5, 0, 3, 6, 2), (2,))


# --- vote --------------------------------------------------------------------------------------------------


def test_most_equal_results_win() -> None:
    there = [good(0, b"8"), good(1, b"7"), good(2, b"7.0"), good(3, b"7"), good(4, b"9")]
    assert vote(there, CanonicalJson()) == Voted(1, (1, 2, 3), majority=True)
    assert vote(there[:3], CanonicalJson()) == Voted(1, (1, 2), majority=True)
    assert vote(there[:4], CanonicalJson()) == vote(there[:4][::-1], CanonicalJson())
    assert vote(there[:1], CanonicalJson()) == Voted(0, (0,), majority=True)


def test_ties_are_named_and_the_first_in_the_fork_wins() -> None:
    there = [good(0, b"8"), good(1, b"7"), good(2, b"7"), good(3, b"8"), good(4, b"9")]
    assert vote(there, CanonicalJson()) == Voted(0, (0, 3), tied=(0, 1))
    assert vote(there[::-1], CanonicalJson()) == Voted(0, (0, 3), tied=(0, 1))


def test_half_is_no_majority() -> None:
    assert vote([good(0, b"8"), good(1, b"8"), good(2, b"7"), good(3, b"9")], CanonicalJson()) == Voted(0, (0, 1))


def test_results_of_one_owner_are_one_vote() -> None:
    there = [good(index, b"7", owner="ann") for index in range(3)]
    there += [good(index, b"8", owner=f"o{index}") for index in (3, 4)]
    assert vote(there, CanonicalJson(), distinct="owner") == Voted(3, (3, 4), majority=True)
    assert vote(there, CanonicalJson()) == Voted(0, (0, 1, 2), majority=True)


def test_votes_by_pairs_are_equal_to_the_winner_itself() -> None:
    there = [good(0, b"1.0"), good(1, b"1.4"), good(2, b"1.8")]
    pairs = [Pair(0, 1, True), Pair(1, 2, True), Pair(0, 2, False)]
    assert vote(there, Numeric(0.5), pairs) == Voted(1, (0, 1, 2), majority=True)
    assert vote(there, PairCritic(), pairs[:1]) == ((0, 2), (1, 2))


def test_there_is_no_vote_over_nothing() -> None:
    with pytest.raises(InvalidArgument):
        vote([], CanonicalJson())
