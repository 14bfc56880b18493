"""Quorums: the order of arrival changes nothing, an early decision is the last one, and nobody votes twice."""

from collections.abc import Iterator
from itertools import combinations, product
from random import Random
from typing import Any

import pytest
from hive_common.contracts.judgement import (
    Candidate,
    CanonicalJson,
    Embedding,
    Equality,
    Exact,
    Numeric,
    Pair,
    PairCritic,
    Producer,
    Rule,
)
from hive_common.judgement.equality import comparable, pairs_with
from hive_common.judgement.quorum import (
    Decided,
    Escalate,
    Extend,
    Failed,
    Kept,
    Outcome,
    Wait,
    check_rule,
    judge,
    sift,
    unit_of,
)
from hive_common.kernel.errors import InvalidArgument
from hypothesis import given, settings
from hypothesis import strategies as st

deterministic = settings(derandomize=True)


def gave(attempt: int, key: str, executor: str = "", **fields: Any) -> Candidate:
    place = executor or f"x{attempt}"
    return Candidate(attempt, place, f"d-{place}", f"o-{place}", digest=f"sha256:{key}", key=key, **fields)


def runs(attempt: int, executor: str = "") -> Producer:
    place = executor or f"x{attempt}"
    return Producer(attempt, place, f"d-{place}", f"o-{place}")


def two_of_three(**fields: Any) -> Rule:
    return Rule(k=2, of=3, **fields)


# --- single cases ------------------------------------------------------------------------------------------


def test_two_equal_results_decide_while_the_third_runs() -> None:
    outcome = judge(two_of_three(), [gave(3, "a"), gave(1, "a")], running=[runs(2)])
    assert outcome == Decided(1, (1, 3))


def test_two_of_three_decide_early_also_by_tolerance() -> None:
    rule = two_of_three(equal=Numeric(0.5))
    there = [gave(3, "a"), gave(1, "b")]
    assert judge(rule, there, [Pair(1, 3, True)], [runs(2)]) == Decided(1, (1, 3))
    assert judge(rule, there, [Pair(1, 3, False)], [runs(2)]) == Wait()


def test_results_that_differ_wait_for_what_runs() -> None:
    assert judge(two_of_three(), [gave(1, "a"), gave(2, "b")], running=[runs(3)]) == Wait()
    assert judge(two_of_three(), [gave(1, "a"), gave(2, "b")], coming=1) == Wait()


def test_when_nobody_agrees_the_rule_says_what_follows() -> None:
    there = [gave(1, "a"), gave(2, "b"), gave(3, "c")]
    assert judge(two_of_three(on_none="extend", extend_to=5), there) == Extend()
    assert judge(two_of_three(on_none="escalate"), there) == Escalate((1, 2, 3))
    assert judge(two_of_three(on_none="fail"), there) == Failed("no_quorum")


def test_extending_ends_where_the_rule_ends_it() -> None:
    rule = two_of_three(extend_to=4)
    there = [gave(number, str(number)) for number in range(1, 4)]
    assert judge(rule, there) == Extend()
    assert judge(rule, [*there, gave(4, "4")]) == Failed("no_quorum")
    assert judge(rule, there, spent=1) == Failed("no_quorum")
    assert judge(rule, [*there, gave(4, "2")]) == Decided(2, (2, 4))


def test_what_cannot_be_met_any_more_is_not_waited_for() -> None:
    all_three = Rule(k=3, of=3, on_none="fail")
    assert judge(all_three, [gave(1, "a"), gave(2, "b")], running=[runs(3)]) == Failed("no_quorum")
    more = Rule(k=3, of=3, on_none="extend", extend_to=6)
    assert judge(more, [gave(1, "a"), gave(2, "b")], running=[runs(3)]) == Extend()
    assert judge(more, [gave(1, "a"), gave(2, "b")], running=[runs(3)], coming=1) == Wait()
    # A senior agent gets all that was paid for.
    senior = Rule(k=3, of=3, on_none="escalate")
    assert judge(senior, [gave(1, "a"), gave(2, "b")], running=[runs(3)]) == Wait()


def test_two_answers_with_as_many_votes_contest_each_other() -> None:
    rule = Rule(k=2, of=4, on_none="fail")
    assert judge(rule, [gave(1, "a"), gave(2, "a"), gave(3, "b"), gave(4, "b")]) == Failed("contested")
    assert judge(rule, [gave(1, "a"), gave(2, "a")], running=[runs(3), runs(4)]) == Wait()
    assert judge(rule, [gave(1, "a"), gave(2, "a"), gave(3, "b")]) == Decided(1, (1, 2))


def test_a_newcomer_may_take_its_votes_from_the_second_results_of_places() -> None:
    # 1 could be equal to 5 and 6, which makes three votes, and not to 2, 3 and 4, which have three as well.
    rule = Rule(k=3, of=6, equal=Numeric(1.0), distinct="executor", on_none="fail")
    there = [gave(2, "2", "A"), gave(3, "3", "B"), gave(4, "4", "D"), gave(5, "5", "B"), gave(6, "6", "D")]
    pairs = [Pair(2, one, True) for one in (3, 4, 5, 6)] + [Pair(3, 4, True)]
    assert judge(rule, there, pairs, [runs(1, "C")]) == Wait()
    first = judge(rule, [*there, gave(1, "1", "C")], [*pairs, Pair(1, 5, True), Pair(1, 6, True)])
    assert first == Failed("contested")


def test_with_one_vote_the_first_valid_result_wins() -> None:
    rule = Rule(k=1, of=3)
    assert judge(rule, [gave(2, "a")], running=[runs(1), runs(3)]) == Decided(2, (2,))
    assert judge(rule, [], running=[runs(1)]) == Wait()
    assert judge(rule, [], spent=3) == Failed("no_valid_result")


@pytest.mark.parametrize("distinct", ["executor", "device", "owner"])
def test_results_of_one_place_are_one_vote(distinct: Any) -> None:
    rule = two_of_three(distinct=distinct, on_none="fail")
    same = [gave(1, "a", "here"), gave(2, "a", "here")]
    assert judge(rule, same, running=[runs(3, "here")]) == Failed("no_quorum")
    assert judge(rule, same, running=[runs(3)]) == Wait()
    assert judge(rule, [*same, gave(3, "a")]) == Decided(1, (1, 3))
    assert judge(two_of_three(distinct="none"), same) == Decided(1, (1, 2))


def test_what_is_not_known_of_two_places_is_the_same() -> None:
    there = [Candidate(one, f"x{one}", digest="sha256:a", key="a") for one in (1, 2, 3)]
    assert judge(two_of_three(distinct="owner", on_none="fail"), there) == Failed("no_quorum")
    assert judge(two_of_three(distinct="executor"), there) == Decided(1, (1, 2, 3))


def test_filters_come_before_the_votes() -> None:
    rule = two_of_three(min_score=0.5, tested=True)
    low = gave(1, "bad", score=0.4, passed=True)
    failed = gave(2, "bad", score=0.9, passed=False)
    good = [gave(3, "good", score=0.5, passed=True), gave(4, "good", score=1.0, passed=True)]
    assert judge(rule, [low, failed, *good]) == Decided(3, (3, 4))
    assert sift(rule, [low, failed]).out.keys() == {1, 2}
    half = [gave(1, "a", score=0.9), gave(2, "a", passed=True)]
    assert judge(rule, half) == Wait(scores=(2,), tests=(1,))
    for score in (float("nan"), float("inf")):
        assert judge(Rule(min_score=0.5), [gave(1, "a", score=score)]) == Failed("no_valid_result")


def test_a_critic_is_asked_about_pairs_that_it_has_not_judged() -> None:
    rule = two_of_three(equal=PairCritic())
    there = [gave(1, "a"), gave(2, "b"), gave(3, "a")]
    assert judge(rule, there, [Pair(1, 3, True)]) == Wait(pairs=((1, 2), (2, 3)))
    assert judge(rule, there, [Pair(1, 2, False), Pair(2, 3, False)]) == Decided(1, (1, 3))


def test_every_result_is_to_have_a_vector_and_what_is_not_compared_yet_is_waited_for() -> None:
    rule = two_of_three(equal=Embedding(0.9))
    assert judge(rule, [gave(1, "a")], running=[runs(2)], coming=1) == Wait(vectors=(1,))
    there = [gave(1, "a"), gave(2, "b"), gave(3, "c", score=0.1)]
    assert judge(rule, there, [Pair(1, 2, True)]) == Wait(vectors=(1, 2, 3))
    assert judge(rule, there, [Pair(1, 2, True), Pair(1, 3, False), Pair(2, 3, False)]) == Decided(1, (1, 2))
    # Of what does not count, nobody makes a vector; and the same bytes are equal without.
    scored = two_of_three(equal=Embedding(0.9), min_score=0.5)
    good = [gave(1, "a", score=0.9), gave(2, "b", score=0.9), there[2], gave(4, "d")]
    assert judge(scored, good, [Pair(1, 2, False)], running=[runs(5)]) == Wait(scores=(4,), vectors=(1, 2))
    assert judge(rule, [gave(1, "a"), gave(3, "a")], running=[runs(2)]) == Decided(1, (1, 3))
    # The first that comes wins where nothing is compared, and what is kept is not either.
    assert judge(Rule(k=1, of=2, equal=Embedding(0.9)), there[:1], running=[runs(2)]) == Decided(1, (1,))
    assert judge(Rule(k=1, of=2, equal=Embedding(0.9), keep="all"), there[:1], coming=1) == Wait()


def test_all_are_kept_where_there_are_enough() -> None:
    rule = Rule(k=2, of=3, keep="all", min_score=0.5, on_none="fail")
    there = [gave(3, "a", score=0.6), gave(1, "b", score=0.7)]
    assert judge(rule, there, running=[runs(2)]) == Wait()
    assert judge(rule, there, spent=1) == Kept((1, 3))
    assert judge(rule, there[:1], spent=2) == Failed("no_quorum")


def test_an_attempt_stands_there_once() -> None:
    with pytest.raises(InvalidArgument):
        judge(two_of_three(), [gave(1, "a"), gave(1, "b")])
    with pytest.raises(InvalidArgument):
        judge(two_of_three(), [gave(1, "a")], running=[runs(1)])


@pytest.mark.parametrize(
    ("rule", "path"),
    [(Rule(k=4, of=3), "k"), (Rule(k=0), "k"), (Rule(of=101), "of"), (Rule(k=2, of=3, extend_to=2), "extend_to")],
)
def test_rules_that_nothing_meets_are_refused(rule: Rule, path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        check_rule(rule)
    assert caught.value.fields["path"] == path


# --- properties --------------------------------------------------------------------------------------------

EQUALITIES: tuple[Equality, ...] = (CanonicalJson(), Exact(), Numeric(1.0), Embedding(0.9), PairCritic())


@st.composite
def worlds(draw: Any, most: int = 6) -> tuple[Rule, list[Candidate], list[Pair]]:
    """A rule, and results of a few answers, of which some places have more than one; pairs are drawn at will."""
    of = draw(st.integers(1, most))
    rule = Rule(
        k=draw(st.integers(1, of)),
        of=of,
        extend_to=draw(st.sampled_from([0, of, of + 2])),
        equal=draw(st.sampled_from(EQUALITIES)),
        distinct=draw(st.sampled_from(["none", "executor", "device", "owner"])),
        on_none=draw(st.sampled_from(["extend", "escalate", "fail"])),
        min_score=draw(st.sampled_from([None, 0.5])),
    )
    scores = st.sampled_from([None, 0.1, 0.9, 0.9, 0.9])
    there = [
        gave(one, draw(st.sampled_from("abc")), f"x{draw(st.integers(1, most))}", score=draw(scores))
        for one in range(1, draw(st.integers(0, most)) + 1)
    ]
    known = [(a, b) for a, b in combinations([one.attempt for one in there], 2) if draw(st.booleans())]
    return rule, there, [Pair(a, b, draw(st.booleans())) for a, b in known]


@deterministic
@given(worlds(), st.randoms(use_true_random=False), st.integers(0, 2))
def test_the_order_of_arrival_changes_nothing(
    world: tuple[Rule, list[Candidate], list[Pair]], random: Random, more: int
) -> None:
    rule, there, pairs = world
    running = [runs(len(there) + 1 + one) for one in range(more)]
    first = judge(rule, there, pairs, running)
    for _ in range(3):
        random.shuffle(there)
        random.shuffle(pairs)
        random.shuffle(running)
        assert judge(rule, there, pairs, running) == first


@deterministic
@given(worlds())
def test_a_winner_has_its_votes_from_as_many_places(world: tuple[Rule, list[Candidate], list[Pair]]) -> None:
    rule, there, pairs = world
    outcome = judge(rule, there, pairs)
    if isinstance(outcome, Decided):
        voters = [one for one in there if one.attempt in outcome.votes]
        assert outcome.winner in outcome.votes
        assert len({unit_of(rule.distinct, one) for one in voters}) == len(voters) >= rule.k
        if rule.k > 1:
            winner = next(one for one in there if one.attempt == outcome.winner)
            assert all(is_equal(rule, winner, one, pairs) for one in voters)


def is_equal(rule: Rule, one: Candidate, other: Candidate, pairs: list[Pair]) -> bool:
    """Say it from the definition, without the code that is tested."""
    if isinstance(rule.equal, CanonicalJson | Exact):
        return one.key == other.key
    if one.digest == other.digest:
        return True
    verdicts = [pair.equal for pair in pairs if {pair.a, pair.b} == {one.attempt, other.attempt}]
    return bool(verdicts) and all(verdicts)


def completions(
    rule: Rule, there: list[Candidate], pairs: list[Pair], running: list[Producer]
) -> Iterator[tuple[list[Candidate], list[Pair]]]:
    """Yield everything that the attempts that run could still give: nothing, or any answer, equal to whatever."""
    if not running:
        yield there, pairs
        return
    one, rest = running[0], running[1:]
    yield from completions(rule, there, pairs, rest)
    if isinstance(rule.equal, CanonicalJson | Exact):
        for key in {two.key for two in there} | {f"new{one.attempt}"}:
            new = Candidate(one.attempt, one.executor, one.device, one.owner, f"sha256:{key}", key)
            yield from completions(rule, [*there, new], pairs, rest)
    else:
        new = Candidate(one.attempt, one.executor, one.device, one.owner, f"sha256:new{one.attempt}")
        for verdicts in product((True, False), repeat=len(there)):
            made = [
                Pair(min(new.attempt, two.attempt), max(new.attempt, two.attempt), verdict)
                for two, verdict in zip(there, verdicts, strict=True)
            ]
            yield from completions(rule, [*there, new], [*pairs, *made], rest)


@st.composite
def unfinished(draw: Any) -> tuple[Rule, list[Candidate], list[Pair], list[Producer]]:
    """Few results of which most are equal, and one or two attempts that run: everything that may come is tried."""
    of = draw(st.integers(2, 6))
    equal = draw(st.sampled_from(EQUALITIES))
    rule = Rule(
        k=draw(st.integers(2, of)),
        of=of,
        equal=equal,
        distinct=draw(st.sampled_from(["none", "executor"])),
        on_none=draw(st.sampled_from(["escalate", "fail"])),
    )
    numbers = draw(st.permutations(range(1, of + 1)))
    open_count = draw(st.integers(1, min(2, of - 1)))
    places = st.integers(1, of)
    keyed = isinstance(equal, CanonicalJson | Exact)
    there = [
        gave(
            one,
            draw(st.sampled_from("aaab")) if keyed else f"v{one}",
            f"x{draw(places)}" if draw(st.booleans()) else "",
        )
        for one in numbers[open_count:]
    ]
    pairs = [
        Pair(a, b, draw(st.sampled_from([True, True, False])))
        for a, b in combinations(sorted(one.attempt for one in there), 2)
    ]
    running = [runs(one, f"x{draw(places)}" if draw(st.booleans()) else "") for one in numbers[:open_count]]
    return rule, there, [] if keyed else pairs, running


seen: dict[str, int] = {}


@settings(deterministic, max_examples=600)
@given(unfinished())
def an_early_outcome_is_that_of_every_end(
    world: tuple[Rule, list[Candidate], list[Pair], list[Producer]],
) -> None:
    rule, there, pairs, running = world
    early = judge(rule, there, pairs, running)
    kind = f"{type(early).__name__} {type(rule.equal).__name__}"
    seen[kind] = seen.get(kind, 0) + 1
    if isinstance(early, Wait):
        return
    by_attempt = {one.attempt: one for one in there}
    for all_there, all_pairs in completions(rule, there, pairs, running):
        last = judge(rule, all_there, all_pairs)
        if isinstance(early, Failed):
            assert isinstance(last, Failed)
        else:
            assert isinstance(early, Decided)
            assert isinstance(last, Decided), (last, all_there, all_pairs)
            by_attempt |= {one.attempt: one for one in all_there}
            assert is_equal(rule, by_attempt[early.winner], by_attempt[last.winner], all_pairs)


def test_an_early_outcome_is_that_of_every_end() -> None:
    an_early_outcome_is_that_of_every_end()
    # It says nothing unless early outcomes of each kind were among what was looked at.
    for equal in ("CanonicalJson", "Numeric", "Embedding", "PairCritic"):
        assert seen.get(f"Decided {equal}", 0) > 5, seen


@settings(deterministic, max_examples=300)
@given(unfinished())
def test_nothing_is_waited_for_in_vain(world: tuple[Rule, list[Candidate], list[Pair], list[Producer]]) -> None:
    """Under keys the early decision is exact: where it waits, ends differ."""
    rule, there, pairs, running = world
    if not isinstance(rule.equal, CanonicalJson | Exact) or judge(rule, there, pairs, running) != Wait():
        return
    ends = set()
    for all_there, all_pairs in completions(rule, there, pairs, running):
        last: Outcome = judge(rule, all_there, all_pairs)
        winner = next(
            (one.key for one in all_there if isinstance(last, Decided) and one.attempt == last.winner), ""
        )
        ends.add(winner)
    assert len(ends) > 1 or rule.on_none == "escalate"


# --- vectors -----------------------------------------------------------------------------------------------

DIRECTIONS = ((1.0, 0.0), (0.95, 0.3), (0.8, 0.6), (0.3, 0.95), (0.0, 1.0))
"""Each is near to the next one, and the first is not near to the last."""


@st.composite
def vectored(draw: Any) -> tuple[Rule, list[Candidate], dict[int, tuple[float, ...]], list[tuple[str, int]]]:
    """A rule, results with their vectors, and an order in which both come: a vector after its result."""
    of = draw(st.integers(2, 6))
    rule = Rule(
        k=draw(st.integers(2, of)),
        of=of,
        equal=Embedding(draw(st.sampled_from([0.9, 0.99]))),
        distinct=draw(st.sampled_from(["none", "executor"])),
        on_none=draw(st.sampled_from(["escalate", "fail"])),
    )
    there, vectors = [], {}
    for one in range(1, of + 1):
        answer = draw(st.integers(0, len(DIRECTIONS) - 1))
        # The same bytes have the same vector; other bytes may have it as well.
        there.append(gave(one, f"{answer}{draw(st.sampled_from('xy'))}", f"x{draw(st.integers(1, of + 2))}"))
        vectors[one] = DIRECTIONS[answer]
    steps = draw(st.permutations([(what, one) for what in ("result", "vector") for one in range(1, of + 1)]))
    came: list[tuple[str, int]] = []
    for what, one in steps:
        if what == "result":
            came.append((what, one))
            came += [("vector", one)] * (("early", one) in came)
        else:
            came.append((what, one) if ("result", one) in came else ("early", one))
    return rule, there, vectors, [step for step in came if step[0] != "early"]


ends: set[str] = set()


@settings(deterministic, max_examples=400)
@given(vectored())
def what_is_decided_with_some_vectors_is_decided_with_all(
    world: tuple[Rule, list[Candidate], dict[int, tuple[float, ...]], list[tuple[str, int]]],
) -> None:
    rule, all_there, vectors, came = world
    by_attempt = {one.attempt: one for one in all_there}
    outcomes: list[Outcome] = []
    there: list[Candidate] = []
    forms: dict[int, tuple[str, Any]] = {}
    pairs: list[Pair] = []
    for what, attempt in came:
        new = by_attempt[attempt]
        if what == "result":
            there.append(new)
        else:
            form = comparable(rule.equal, b"", vectors[attempt])
            pairs += pairs_with(rule.equal, attempt, new.digest, form, forms)
            forms[attempt] = new.digest, form
        running = [Producer(one.attempt, one.executor) for one in all_there if one not in there]
        outcomes.append(judge(rule, there, pairs, running))
    last = outcomes[-1]
    assert not isinstance(last, Wait)
    for early in outcomes:
        ends.add(f"{type(early).__name__} {early is last}")
        if isinstance(early, Wait):
            assert early.vectors or not there
        elif isinstance(early, Decided):
            assert isinstance(last, Decided)
            one, other = by_attempt[early.winner], by_attempt[last.winner]
            assert is_equal(rule, one, other, pairs), (early, last)
        else:
            assert type(early) is type(last)


def test_what_is_decided_with_some_vectors_is_decided_with_all() -> None:
    what_is_decided_with_some_vectors_is_decided_with_all()
    assert {"Decided False", "Decided True", "Wait False", "Failed True", "Escalate True"} <= ends
