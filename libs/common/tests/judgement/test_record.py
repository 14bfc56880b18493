"""Records of decisions: the rule applied again gives the same, and what was changed in a record is found."""

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest
from hive_common.contracts.judgement import (
    Candidate,
    CanonicalJson,
    Decision,
    Embedding,
    Judge,
    Numeric,
    Pair,
    PairCritic,
    Producer,
    Rule,
    parse_decision,
)
from hive_common.contracts.values import digest_of
from hive_common.judgement.equality import comparable, key_of, pairs_with
from hive_common.judgement.independence import conflict
from hive_common.judgement.quorum import Decided, Escalate, Extend, Failed, Kept, Wait, judge
from hive_common.judgement.record import Differs, NotCheckable, Same, compare, decision_of, recompute, self_judged
from hive_common.kernel.errors import UnknownEvent
from hypothesis import given, settings
from hypothesis import strategies as st

GOLDEN = Path(__file__).with_name("decisions_v1.jsonl")
deterministic = settings(derandomize=True)

VECTORS = {1: (1.0, 0.0), 2: (0.9, 0.1), 3: (0.0, 1.0)}


def candidate(rule: Rule, attempt: int, payload: bytes, **fields: Any) -> Candidate:
    key = key_of(rule.equal, payload)
    place = f"x{attempt}"
    return Candidate(attempt, place, f"d{attempt}", f"o{attempt}", digest=digest_of(payload), key=key, **fields)


def decided(rule: Rule, *payloads: bytes, running: int = 0, **fields: Any) -> Decision:
    """Judge as the scheduler would, result after result, and return the record."""
    there: list[Candidate] = []
    forms: dict[int, tuple[str, Any]] = {}
    pairs: list[Pair] = []
    for attempt, payload in enumerate(payloads, 1):
        new = candidate(rule, attempt, payload, **fields)
        form = comparable(rule.equal, payload, VECTORS.get(attempt))
        pairs += pairs_with(rule.equal, attempt, new.digest, form, forms)
        forms[attempt] = (new.digest, form)
        there.append(new)
    still = [Producer(len(there) + 1 + one, f"x{len(there) + 1 + one}") for one in range(running)]
    outcome = judge(rule, there, pairs, still)
    assert isinstance(outcome, Decided | Kept | Escalate | Failed)
    made = there if isinstance(rule.equal, Embedding) else []
    at = Producer(1, "x9", "d9", "o9")
    judges = [Judge("vector", "vector@1", f"v{one.attempt}", at, (one.attempt,)) for one in made]
    return decision_of("task", rule, outcome, candidates=there, pairs=pairs, judges=judges, running=still)


NUMBERS = (b"1.0", b"1.4", b"9")
EXAMPLES = [
    decided(Rule(k=2, of=3), b'{"a":1}', b'{"a": 1.0}', running=1),
    decided(Rule(k=2, of=3, equal=Numeric(0.5)), *NUMBERS),
    decided(Rule(k=2, of=3, equal=Embedding(0.9)), *NUMBERS),
    decided(Rule(k=2, of=3, on_none="fail"), *NUMBERS),
    decided(Rule(k=2, of=3, on_none="escalate"), *NUMBERS),
    decided(Rule(k=2, of=3, keep="all"), *NUMBERS),
    decided(Rule(), b"7"),
]


@pytest.mark.parametrize("decision", EXAMPLES)
def test_a_decision_is_the_same_when_it_is_made_again(decision: Decision) -> None:
    again = parse_decision(msgspec.json.encode(decision))
    assert again == decision
    assert recompute(again) == Same()
    payloads = {digest_of(one): one for one in (*NUMBERS, b'{"a":1}', b'{"a": 1.0}', b"7")}
    assert compare(again, payloads, VECTORS) == Same()


def test_decisions_that_were_written_are_read_for_ever() -> None:
    """The file is never edited; a later version of the record gets lines of its own."""
    lines = GOLDEN.read_bytes().splitlines()
    known = [parse_decision(line) for line in lines]
    # The third is older than judges that make vectors, and of no installation: its job was refused then.
    unnamed = known.pop(2)
    assert unnamed == changed(EXAMPLES[2], judges=())
    assert recompute(unnamed) == Differs(
        ("judges: nobody is named for the verdict (vector) on attempts [1, 2, 3]",)
    )
    assert known == [*EXAMPLES[:2], *EXAMPLES[3:], EXAMPLES[2]]
    assert all(recompute(one) == Same() for one in known)


def test_a_record_may_have_fields_that_are_not_known_yet() -> None:
    plain = msgspec.json.decode(msgspec.json.encode(EXAMPLES[0]))
    assert parse_decision(msgspec.json.encode({**plain, "later": 1})) == EXAMPLES[0]
    for broken in ({**plain, "v": 2}, {**plain, "rule": {"equal": {"by": "dice"}}}, {"task": "no version"}, 7):
        with pytest.raises(UnknownEvent):
            parse_decision(msgspec.json.encode(broken))


def changed(decision: Decision, **fields: Any) -> Decision:
    return msgspec.structs.replace(decision, **fields)


def with_candidate(decision: Decision, at: int, **fields: Any) -> Decision:
    there = list(decision.candidates)
    there[at] = msgspec.structs.replace(there[at], **fields)
    return changed(decision, candidates=tuple(there))


ONE = EXAMPLES[0]
CHANGES: list[Callable[[], Decision]] = [
    lambda: changed(ONE, winner=2),
    lambda: changed(ONE, winner=None),
    lambda: changed(ONE, votes=(1,)),
    lambda: changed(ONE, reason="because"),
    lambda: changed(ONE, outcome="failed"),
    lambda: changed(ONE, candidates=ONE.candidates[:1]),
    lambda: changed(ONE, candidates=(*ONE.candidates, ONE.candidates[0])),
    lambda: changed(ONE, rule=Rule(k=3, of=3)),
    lambda: changed(ONE, rule=Rule(k=4, of=3)),
    lambda: changed(ONE, rule=Rule(k=2, of=3, extend_to=1)),
    lambda: changed(ONE, judges=(Judge("critic", "critic@1", "t9", Producer(1, "x9", "d9", "o9"), (7,)),)),
    lambda: changed(ONE, running=tuple(Producer(number, f"y{number}", f"e{number}") for number in (7, 8))),
    lambda: changed(ONE, coming=3),
    lambda: with_candidate(ONE, 0, key="another"),
    lambda: with_candidate(ONE, 1, device="d1"),
    lambda: with_candidate(ONE, 0, score=0.5),
    lambda: with_candidate(ONE, 0, passed=True),
    lambda: changed(EXAMPLES[1], pairs=()),
    lambda: changed(EXAMPLES[3], votes=(1,)),
    lambda: changed(EXAMPLES[3], winner=1),
    lambda: changed(EXAMPLES[4], winner=7),
    lambda: changed(EXAMPLES[4], winner=1),
    lambda: changed(EXAMPLES[5], winner=1),
]


@pytest.mark.parametrize("number", range(len(CHANGES)))
def test_a_record_that_was_changed_differs(number: int) -> None:
    check = recompute(CHANGES[number]())
    assert isinstance(check, Differs) and check.why


def test_values_that_are_others_differ_and_those_that_are_gone_are_not_checkable() -> None:
    payloads = {digest_of(one): one for one in NUMBERS}
    first = EXAMPLES[1].candidates[0]
    assert isinstance(compare(EXAMPLES[1], {**payloads, first.digest: b"1.1"}), Differs)
    assert isinstance(compare(EXAMPLES[1], {}), NotCheckable)
    gone = compare(EXAMPLES[1], {digest_of(NUMBERS[1]): NUMBERS[1]})
    assert isinstance(gone, NotCheckable) and "attempt 1" in gone.why[0] and len(gone.why) == 2
    other_pairs = changed(EXAMPLES[1], pairs=(Pair(1, 2, True), Pair(2, 3, True)))
    check = compare(other_pairs, payloads)
    assert isinstance(check, Differs) and "2 and 3" in check.why[0]
    other_key = with_candidate(EXAMPLES[0], 1, key="sha256:other")
    both = {digest_of(one): one for one in (b'{"a":1}', b'{"a": 1.0}')}
    assert isinstance(compare(other_key, both), Differs)
    # One value is gone, and of the rest one is wrong: that counts.
    assert isinstance(compare(other_key, {other_key.candidates[1].digest: b'{"a": 1.0}'}), Differs)


def test_without_vectors_an_embedding_is_not_checkable() -> None:
    payloads = {digest_of(one): one for one in NUMBERS}
    assert isinstance(compare(EXAMPLES[2], payloads), NotCheckable)
    assert isinstance(compare(EXAMPLES[2], payloads, {**VECTORS, 2: (0.0, -1.0)}), Differs)
    gone = compare(EXAMPLES[2], payloads, {1: VECTORS[1], 2: VECTORS[2]})
    assert gone == NotCheckable(("there is no vector of attempt 3",))
    # The same bytes are equal without any.
    same = decision_of(
        "task",
        EXAMPLES[2].rule,
        Decided(1, (1, 2)),
        candidates=[candidate(EXAMPLES[2].rule, one, b"1.0") for one in (1, 2)],
        running=[Producer(3, "x3")],
    )
    assert (recompute(same), compare(same, payloads)) == (Same(), Same())


def test_a_pair_without_a_vector_decides_nothing() -> None:
    check = recompute(changed(EXAMPLES[2], pairs=EXAMPLES[2].pairs[:1]))
    assert check == Differs(("the rule gives no decision yet: wait",))
    check = recompute(changed(EXAMPLES[2], judges=EXAMPLES[2].judges[1:]))
    assert check == Differs(("judges: nobody is named for the verdict (vector) on attempts [1]",))


def test_what_a_critic_said_of_pairs_is_not_checkable_and_it_has_to_be_named() -> None:
    rule = Rule(k=2, of=2, equal=PairCritic())
    there = [candidate(rule, one, str(one).encode()) for one in (1, 2)]
    pairs = [Pair(1, 2, True)]
    outcome = judge(rule, there, pairs)
    assert isinstance(outcome, Decided)
    named = Judge("pairs", "critic@1", "t9", Producer(1, "x9", "d9", "o9"), (1, 2))
    decision = decision_of("task", rule, outcome, candidates=there, pairs=pairs, judges=[named])
    assert recompute(decision) == Same()
    assert isinstance(compare(decision, {digest_of(b"1"): b"1", digest_of(b"2"): b"2"}), NotCheckable)
    unnamed = recompute(changed(decision, judges=()))
    assert isinstance(unnamed, Differs) and "nobody is named" in unnamed.why[0]


# --- who judged --------------------------------------------------------------------------------------------


def scored(distinct: Any, judge_at: Producer) -> Decision:
    rule = Rule(k=1, of=1, min_score=0.5, distinct=distinct)
    there = [candidate(rule, 1, b"1", score=0.9)]
    by = Judge("critic", "critic@1", "t9", judge_at, (1,))
    return decision_of("task", rule, Decided(1, (1,)), candidates=there, judges=[by])


@pytest.mark.parametrize(
    ("distinct", "place", "reason"),
    [
        ("executor", Producer(1, "x1", "d9", "o9"), "produced_what_it_judges"),
        ("executor", Producer(1, "x9", "d1", "o1"), ""),
        ("device", Producer(1, "x9", "d1", "o9"), "same_device_as_what_it_judges"),
        ("device", Producer(1, "x9", "d9", "o1"), ""),
        ("owner", Producer(1, "x9", "d9", "o1"), "same_owner_as_what_it_judges"),
        ("owner", Producer(1, "x9", "d9", "o9"), ""),
        ("none", Producer(1, "x1", "d1", "o1"), ""),
    ],
)
def test_nobody_judges_the_work_of_its_own_place(distinct: Any, place: Producer, reason: str) -> None:
    decision = scored(distinct, place)
    assert conflict(distinct, place, decision.candidates) == reason
    check = recompute(decision)
    assert check == Same() if not reason else isinstance(check, Differs) and reason in check.why[0]


def test_that_somebody_judged_itself_stands_in_the_record() -> None:
    assert self_judged(scored("none", Producer(1, "x1", "d1", "o1"))) == (("critic@1", 1),)
    assert self_judged(scored("none", Producer(1, "x9", "d1", "o1"))) == ()


def test_a_senior_agent_chooses_among_what_it_was_given() -> None:
    rule = Rule(k=2, of=2, on_none="escalate")
    there = [candidate(rule, one, str(one).encode()) for one in (1, 2)]
    outcome = judge(rule, there)
    assert outcome == Escalate((1, 2))
    senior = Judge("senior", "senior@1", "t9", Producer(1, "x9", "d9", "o9"), (1, 2))
    decision = decision_of("task", rule, outcome, candidates=there, judges=[senior], chosen=2)
    assert (decision.outcome, decision.winner, recompute(decision)) == ("escalated", 2, Same())
    for wrong, reason in ((changed(decision, winner=7), "not among"), (changed(decision, judges=()), "senior")):
        check = recompute(wrong)
        assert isinstance(check, Differs) and len(check.why) == 1 and reason in check.why[0]
    none = decision_of("task", rule, outcome, candidates=there, judges=[senior])
    assert (none.winner, recompute(none)) == (None, Same())


# --- any decision ------------------------------------------------------------------------------------------


@deterministic
@given(st.integers(0, 2**64 - 1))
def test_whatever_is_decided_is_decided_again(seed: int) -> None:
    random = Random(seed)
    of = random.randint(1, 6)
    rule = Rule(
        k=random.randint(1, of),
        of=of,
        equal=random.choice([CanonicalJson(), Numeric(1.0)]),
        on_none=random.choice(["extend", "escalate", "fail"]),
        keep=random.choice(["first", "first", "all"]),
        distinct=random.choice(["none", "owner"]),
    )
    there = [
        candidate(rule, one, str(random.randint(0, 2)).encode()) for one in range(1, random.randint(1, of) + 1)
    ]
    pairs = [
        Pair(a.attempt, b.attempt, random.random() < 0.5) for a in there for b in there if a.attempt < b.attempt
    ]
    running = [Producer(of + 1 + one, f"x{of + 1 + one}") for one in range(random.randint(0, 2))]
    outcome = judge(rule, there, pairs, running)
    if isinstance(outcome, Wait | Extend):
        undecided = decision_of("task", rule, Failed("no_quorum"), candidates=there, pairs=pairs, running=running)
        assert isinstance(recompute(undecided), Differs)
        return
    decision = decision_of("task", rule, outcome, candidates=there, pairs=pairs, running=running)
    for made in (there, pairs, running):
        random.shuffle(made)  # type: ignore[arg-type]
    assert decision_of("task", rule, outcome, candidates=there, pairs=pairs, running=running) == decision
    assert recompute(parse_decision(msgspec.json.encode(decision))) == Same()
