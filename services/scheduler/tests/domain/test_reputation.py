"""What events say of executors, and fleets with liars: the real rules over events, through the real projection."""

from collections import Counter
from random import Random
from typing import Any

import msgspec
import pytest
from hive_common.contracts import events, values
from hive_common.contracts.events import AttemptLate, AttemptLost, Event, TaskAssigned, TaskCreated, TaskDecided
from hive_common.contracts.judgement import (
    Candidate,
    Decision,
    Exact,
    Judge,
    Numeric,
    OnNone,
    Pair,
    Producer,
    Rule,
)
from hive_common.eventlog.log import Stored
from hive_common.judgement.quorum import Decided, Extend, Failed, judge
from hive_common.judgement.record import Same, decision_of, recompute
from hive_common.judgement.reputation import TRUSTED_AFTER
from hive_common.testing.memory_log import MemoryLog, MemoryReader
from hive_scheduler.domain import task as tasks
from hive_scheduler.domain.reputation import AGENTS_MAX, Book, Holder, observed
from hive_scheduler.reputation import Reputation

AGENT = "guess@1.0.0"


def candidate(attempt: int, key: str, executor: str = "", **said: Any) -> Candidate:
    place = executor or f"e{attempt}"
    return Candidate(attempt, place, place, place, f"sha256:{key}{attempt}", key, **said)


def judged(
    rule: Rule, *candidates: Candidate, pairs: tuple[Pair, ...] = (), trust: int = 0
) -> dict[str, list[str]]:
    """Return what the decision over candidates says of each executor."""
    outcome = judge(rule, candidates, pairs)
    assert isinstance(outcome, Decided | Failed)
    judges = [
        Judge(
            kind, f"{kind}@1.0.0", f"{kind} {one.attempt}", Producer(1, "judge", "judge", "judge"), (one.attempt,)
        )
        for one in candidates
        for kind, verdict in (("critic", one.score), ("test", one.passed))
        if verdict is not None
    ]
    decision = decision_of("t", rule, outcome, candidates=candidates, pairs=pairs, judges=judges)
    assert recompute(decision) == Same()
    return said(TaskDecided(decision, trust))


def said(event: Event, lost: bool = False, **executors: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    holders = {int(name[1:]): Holder(executor, lost) for name, executor in executors.items()}
    for one in observed(event, AGENT, holders.get):
        assert one.agent == AGENT
        found.setdefault(one.executor, []).append(one.ending)
    return found


QUORUM = Rule(k=2, of=3, on_none="fail", distinct="executor")


def test_a_quorum_judges_whoever_took_part() -> None:
    found = judged(QUORUM, candidate(1, "x"), candidate(2, "y"), candidate(3, "x"))
    assert found == {"e1": ["valid"], "e2": ["invalid"], "e3": ["valid"]}
    # Its second result is no vote, and equal all the same.
    found = judged(QUORUM, candidate(1, "x"), candidate(2, "x"), candidate(3, "x", "e1"))
    assert found == {"e1": ["valid", "valid"], "e2": ["valid"]}


def test_results_within_a_tolerance_of_the_winner_are_valid() -> None:
    rule = msgspec.structs.replace(QUORUM, equal=Numeric(absolute=0.1))
    pairs = (Pair(1, 2, True), Pair(1, 3, False), Pair(2, 3, False))
    found = judged(rule, candidate(1, ""), candidate(2, ""), candidate(3, ""), pairs=pairs)
    assert found == {"e1": ["valid"], "e2": ["valid"], "e3": ["invalid"]}


def test_where_nothing_was_decided_nobody_is_judged() -> None:
    assert judged(QUORUM, candidate(1, "x"), candidate(2, "y"), candidate(3, "z")) == {}
    senior = Judge("senior", "wise@1.0.0", "j", Producer(1, "e9"), (1, 2))
    candidates = (candidate(1, "x"), candidate(2, "y"))
    escalated = Decision(1, "t", QUORUM, "escalated", 1, (1,), "", candidates, judges=(senior,))
    assert said(TaskDecided(escalated)) == {}


def test_a_result_that_was_taken_on_trust_judges_nobody() -> None:
    rule = msgspec.structs.replace(QUORUM, k=1, of=1)
    assert judged(rule, candidate(1, "x"), trust=12) == {}
    assert judged(Rule(), candidate(1, "x")) == {}
    tested = msgspec.structs.replace(rule, tested=True)
    assert judged(tested, candidate(1, "x", passed=True), trust=12) == {"e1": ["valid"]}
    assert judged(tested, candidate(1, "x", passed=False), trust=12) == {"e1": ["invalid"]}


def test_who_agrees_with_itself_has_shown_nothing() -> None:
    rule = Rule(k=2, of=2, on_none="fail", distinct="none", equal=Exact())
    assert judged(rule, candidate(1, "x", "e1"), candidate(2, "x", "e1")) == {}


@pytest.mark.parametrize("on_none", ["fail", "extend"])
def test_a_test_judges_whoever_it_was_asked_about(on_none: OnNone) -> None:
    rule = Rule(k=1, of=3, tested=True, on_none=on_none, distinct="executor")
    found = judged(rule, candidate(1, "", passed=False), candidate(2, "", passed=True), candidate(3, ""))
    assert found == {"e1": ["invalid"], "e2": ["valid"]}
    assert judged(rule, *(candidate(one, "", passed=False) for one in (1, 2, 3))) == {
        "e1": ["invalid"],
        "e2": ["invalid"],
        "e3": ["invalid"],
    }


def test_of_a_quorum_over_tested_results_both_have_a_say() -> None:
    rule = msgspec.structs.replace(QUORUM, of=4, tested=True)
    candidates = [candidate(one, key, passed=passed) for one, key, passed in _TESTED]
    assert judged(rule, *candidates) == {"e1": ["valid"], "e2": ["valid"], "e3": ["invalid"], "e4": ["invalid"]}


_TESTED = ((1, "x", True), (2, "x", True), (3, "x", False), (4, "y", True))


def test_scores_of_critics_judge_nobody() -> None:
    rule = Rule(k=1, of=2, min_score=0.5, on_none="fail", distinct="executor")
    assert judged(rule, candidate(1, "", score=0.1), candidate(2, "", score=0.9)) == {}
    quorum = msgspec.structs.replace(QUORUM, of=3, min_score=0.5)
    found = judged(quorum, candidate(1, "x", score=0.9), candidate(2, "x", score=0.9), candidate(3, "y", score=0.1))
    assert found == {"e1": ["valid"], "e2": ["valid"]}


def test_what_comes_late_or_never_counts_and_what_is_given_back_does_not() -> None:
    assert said(AttemptLate(2, "succeeded"), lost=True, a1="e1", a2="e2") == {"e2": ["late"]}
    assert said(AttemptLate(2, "succeeded"), a1="e1", a2="e2") == {}, "others were faster"
    for reason in ("lease_expired", "session_ended", "overtime"):
        assert said(AttemptLost(1, reason), a1="e1") == {"e1": ["lost"]}
    for reason in ("given_back", "killed", "revoked"):
        assert said(AttemptLost(1, reason), a1="e1") == {}
    assert said(AttemptLost(7, "overtime"), a1="e1") == {}


def test_of_many_agents_the_one_that_changed_longest_ago_is_dropped_and_totals_stay() -> None:
    book = Book()
    for number in range(AGENTS_MAX):
        assert book.add(f"a{number}@1.0.0", "valid") is None
    assert book.add("a0@1.0.0", "late") is None
    assert book.add("new@1.0.0", "valid") == "a1@1.0.0"
    assert len(book.agents) == AGENTS_MAX
    assert (book.counts.valid, book.counts.late, book.in_a_row) == (AGENTS_MAX + 1, 1, 20)


def test_two_lies_are_quarantine_until_a_person_says_otherwise() -> None:
    changed: list[str] = []
    reputation = Reputation("default")
    reputation.on_standing = changed.append
    lie = TaskDecided(
        decision_of(
            "t",
            QUORUM,
            Decided(1, (1, 2)),
            candidates=(candidate(1, "x"), candidate(2, "x"), candidate(3, "y")),
        )
    )
    for _ in range(TRUSTED_AFTER):
        reputation.observe(lie, AGENT, lambda _: None)
    assert changed == ["e3", "e1", "e2"]
    assert [reputation.standing(one) for one in ("e1", "e3", "never seen")] == ["known", "quarantined", "new"]
    assert reputation.trust("e1", AGENT, 0.5) == TRUSTED_AFTER
    assert reputation.trust("e1", AGENT, 0.05) is None, "now and then it is checked"
    assert reputation.trust("e1", "other@1.0.0", 0.99) is None, "nothing is known of it under this agent"
    assert reputation.trust("e3", AGENT, 0.99) is None
    assert reputation.refused("e3", "ann", "bob", True) == "quarantined"
    reputation.trusted("e3", 1)
    assert (reputation.standing("e3"), changed[-1]) == ("new", "e3")
    assert reputation.book("e3").counts.invalid == 0
    assert reputation.refused("e3", "ann", "bob", True) == ""
    assert reputation.refused("e3", "ann", "bob", False) == "new_executor"


def test_a_number_is_drawn_once_for_a_result_and_anew_for_the_next() -> None:
    drawn = iter([0.5, 0.01, 0.5])
    reputation = Reputation("default", lambda: next(drawn))
    agreed = TaskDecided(
        decision_of("t", QUORUM, Decided(1, (1, 2)), candidates=(candidate(1, "x"), candidate(2, "x")))
    )
    for _ in range(TRUSTED_AFTER):
        reputation.observe(agreed, AGENT, lambda _: None)
    first, second = (tasks.created(one, TaskCreated("job", "s", AGENT)) for one in ("t1", "t2"))
    assert [reputation.trust_in(first, Producer(1, "e1")) for _ in range(3)] == [TRUSTED_AFTER] * 3
    assert [reputation.trust_in(second, Producer(1, "e1")) for _ in range(3)] == [None] * 3
    assert reputation.trust_in(second, Producer(2, "e1")) == TRUSTED_AFTER


# --- fleets ------------------------------------------------------------------------------------------------


class EmptyTable:
    """A table that nobody has written yet."""

    async def load(self, ns: str) -> tuple[int, dict[str, Book]]:
        return 0, {}


class Fleet:
    """Simulated executors, whose results become events that go into a log and into the leader's memory.

    Args:
        liars: executor → percentage of its results that are lies, each one of its own.
        size: how many executors there are.
        seed: of all chance.
    """

    def __init__(self, liars: dict[str, int], size: int, seed: int) -> None:
        self.random = Random(seed)
        self.liars = liars
        self.executors = [f"e{one}" for one in range(size)]
        self.log = MemoryLog()
        self.reputation = Reputation("default", self.random.random)
        self.tasks: Counter[str] = Counter()
        self.tasks_until_quarantine: dict[str, int] = {}
        self.lies = 0
        self.accepted: Counter[str] = Counter()
        self.extra: list[int] = []
        self.reputation.on_standing = self._note

    def _note(self, executor: str) -> None:
        if self.reputation.standing(executor) == "quarantined":
            self.tasks_until_quarantine[executor] = self.tasks[executor]

    def answer(self, task: int, executor: str) -> str:
        self.tasks[executor] += 1
        if self.random.random() * 100 < self.liars.get(executor, 0):
            self.lies += 1
            return f"lie of {executor} about {task}"
        return f"truth of {task}"

    def append(self, stream: str, event: Event, attempts: list[str]) -> None:
        """Put an event into the log as it would be stored, and into the leader's memory as it is decided."""
        stored = Stored(
            *(self.log.head + 1, stream, self.log.version(stream) + 1, type(event).__name__, events.SCHEMA, 1),
            *("scheduler", "owner", "default", "", "job", "", events.encode(event), b"", b""),
        )
        self.log.rows.append((stored.position, stream, stored.version, stored.type, b"", b"", None, None))
        self.log.events.append(stored)
        self.log._by_stream.setdefault(stream, []).append(stored)
        self.log._versions[stream] = stored.version
        self.reputation.observe(event, AGENT, lambda attempt: Holder(attempts[attempt - 1]))

    def run(self, number: int, rule: Rule, adaptive: bool) -> None:
        """Run one task by the leader's rule: on trust where there is some, else by the quorum, in any order."""
        stream, free = f"task {number}", [one for one in self.executors if one not in self.tasks_until_quarantine]
        order = self.random.sample(free, min(rule.extend_to, len(free)))
        self.append(stream, TaskCreated("job", "s", AGENT, input=values.inline(b"1")), [])
        attempts: list[str] = []
        running: list[Producer] = []
        there: list[Candidate] = []
        trust: int | None = None

        def start() -> None:
            executor = order[len(attempts)]
            attempts.append(executor)
            running.append(Producer(len(attempts), executor, executor, executor))
            self.append(stream, TaskAssigned(len(attempts), executor, "session", 1_000), attempts)

        def end() -> None:
            done = running.pop(self.random.randrange(len(running)))
            key = self.answer(number, done.executor)
            there.append(candidate(done.attempt, key, done.executor))

        start()
        if adaptive:
            end()
            trust = self.reputation.trust(attempts[0], AGENT, self.reputation.chance())
        while trust is None and len(attempts) < rule.of:
            start()
        if trust is not None:
            rule = Rule(distinct=rule.distinct)
        while isinstance(outcome := judge(rule, there, (), running), Extend) or running:
            if isinstance(outcome, Decided | Failed):
                break
            if isinstance(outcome, Extend):
                start()
            end()
        assert isinstance(outcome, Decided | Failed)
        decision = decision_of(stream, rule, outcome, candidates=there, running=running)
        assert recompute(decision) == Same()
        self.append(stream, TaskDecided(decision, trust or 0), attempts)
        self.extra.append(len(attempts) - 1)
        key = next(one.key for one in there if one.attempt == decision.winner) if decision.winner else "failed"
        self.accepted[key.split()[0]] += 1

    async def check_against_the_log(self) -> None:
        """What a new leader folds from the log is what this one has in memory."""
        again = Reputation("default")
        await again.load(EmptyTable(), MemoryReader(self.log))
        assert again.position == self.log.head
        assert sorted(again.executors()) == sorted(self.reputation.executors())
        for executor in again.executors():
            assert again.book(executor) == self.reputation.book(executor)


@pytest.mark.parametrize("seed", range(3))
async def test_a_quorum_of_two_of_three_accepts_no_lie_while_a_third_of_executors_lie(seed: int) -> None:
    fleet = Fleet({f"e{one}": 100 for one in range(9)}, 30, seed)
    rule = Rule(k=2, of=3, extend_to=6, distinct="executor")
    for number in range(600):
        fleet.run(number, rule, adaptive=False)
    assert fleet.accepted["lie"] == 0
    assert fleet.lies >= 18, "there were lies to accept"
    assert set(fleet.tasks_until_quarantine) == set(fleet.liars)
    assert fleet.accepted["truth"] >= 595
    await fleet.check_against_the_log()


@pytest.mark.parametrize("lie_percent", [100, 50])
@pytest.mark.parametrize("seed", range(2))
async def test_adaptive_replication_converges_with_liars_in_quarantine(seed: int, lie_percent: int) -> None:
    fleet = Fleet({f"e{one}": lie_percent for one in range(12)}, 40, seed)
    rule = Rule(k=2, of=2, extend_to=6, distinct="executor")
    for number in range(2_500):
        fleet.run(number, rule, adaptive=True)
    assert set(fleet.tasks_until_quarantine) == set(fleet.liars), "all liars, and nobody else"
    assert max(fleet.tasks_until_quarantine.values()) <= 20
    tail = fleet.extra[-800:]
    assert sum(tail) / len(tail) <= 0.15
    assert fleet.accepted["lie"] == 0
    assert fleet.accepted["failed"] <= 25
    await fleet.check_against_the_log()
