"""Records of executors, and simulated fleets with liars, each from a seed."""

from collections import Counter
from random import Random

import pytest
from hive_common.contracts.judgement import Candidate, Producer, Rule
from hive_common.judgement.quorum import Decided, Extend, Failed, judge
from hive_common.judgement.reputation import (
    CHECK_MIN,
    JUDGED_KEPT,
    TRUSTED_AFTER,
    AgentRecord,
    Ending,
    ExecutorRecord,
    check_probability,
    evolve_agent,
    evolve_executor,
    gets_canary,
    is_checked,
    refused,
    standing,
)
from hypothesis import given, settings
from hypothesis import strategies as st

deterministic = settings(derandomize=True)
endings: st.SearchStrategy[list[Ending]] = st.lists(st.sampled_from(["valid", "valid", "invalid", "late", "lost"]))


def after(*results: Ending) -> tuple[AgentRecord, ExecutorRecord]:
    agent, executor = AgentRecord(), ExecutorRecord()
    for one in results:
        agent, executor = evolve_agent(agent, one), evolve_executor(executor, one)
    return agent, executor


GOOD: tuple[Ending, ...] = ("valid",) * TRUSTED_AFTER


def test_who_is_new_is_checked_always_and_then_less_and_less() -> None:
    agent, executor = after(*GOOD[1:])
    assert check_probability(agent) == 1.0 and is_checked(agent, executor, 0.999999)
    agent, executor = after(*GOOD)
    assert check_probability(agent) == 0.1
    assert is_checked(agent, executor, 0.09) and not is_checked(agent, executor, 0.1)
    assert check_probability(AgentRecord(in_a_row=40)) == 1 / 40
    assert check_probability(AgentRecord(in_a_row=10**9)) == CHECK_MIN


@deterministic
@given(endings)
def test_checking_never_ends_and_one_invalid_result_begins_it_anew(results: list[Ending]) -> None:
    agent, executor = after(*results)
    assert CHECK_MIN <= check_probability(agent) <= 1.0
    assert is_checked(agent, executor, 0.0)
    assert len(executor.judged) <= JUDGED_KEPT
    assert check_probability(evolve_agent(agent, "valid")) <= check_probability(agent)
    caught = evolve_agent(agent, "invalid"), evolve_executor(executor, "invalid")
    assert check_probability(caught[0]) == 1.0 and is_checked(*caught, 0.999999)
    for ending in ("late", "lost"):  # no lies
        assert check_probability(evolve_agent(agent, ending)) == check_probability(agent)
        assert evolve_executor(executor, ending) == executor
    counted = Counter(results)
    assert (agent.valid, agent.invalid, agent.late, agent.lost) == tuple(
        counted[one] for one in ("valid", "invalid", "late", "lost")
    )


def test_an_agent_that_is_new_on_a_known_executor_is_checked() -> None:
    _, executor = after(*GOOD)
    assert is_checked(AgentRecord(), executor, 0.999999)


def test_an_invalid_result_of_one_agent_has_those_of_all_checked() -> None:
    agent, executor = after(*GOOD)
    assert not is_checked(agent, executor, 0.999999)
    assert is_checked(agent, evolve_executor(executor, "invalid"), 0.999999)


def test_two_invalid_results_of_the_last_judged_are_quarantine() -> None:
    assert standing(after()[1]) == "new"
    assert standing(after(*GOOD)[1]) == "known"
    assert standing(after(*GOOD, "invalid")[1]) == "new"
    assert standing(after("invalid", *GOOD)[1]) == "known"
    assert standing(after("invalid", *GOOD, "invalid")[1]) == "quarantined"
    old: tuple[Ending, ...] = ("invalid", *("valid",) * (JUDGED_KEPT - 1), "invalid")
    assert standing(after(*old)[1]) == "new"
    assert standing(after("invalid", "invalid", *GOOD, *GOOD, *GOOD)[1]) == "quarantined"


def test_new_executors_get_only_low_trust_work_of_others() -> None:
    new, known, bad = ExecutorRecord(), after(*GOOD)[1], after("invalid", "invalid")[1]
    assert [refused(new, "ann", "ann", False), refused(new, "ann", "bob", True)] == ["", ""]
    assert refused(new, "ann", "bob", False) == "new_executor"
    assert [refused(known, "ann", "bob", low) for low in (True, False)] == ["", ""]
    assert [refused(bad, "ann", "bob", low) for low in (True, False)] == ["quarantined"] * 2
    assert refused(bad, "ann", "ann", False) == ""


def test_canaries_go_mostly_to_new_executors_and_to_none_in_quarantine() -> None:
    random = Random(1)
    chances = [random.random() for _ in range(10_000)]
    share = [
        sum(gets_canary(one, chance) for chance in chances) / len(chances)
        for one in (ExecutorRecord(), after(*GOOD)[1], after("invalid", "invalid")[1])
    ]
    assert share[0] == pytest.approx(0.1, abs=0.01)
    assert share[1] == pytest.approx(0.01, abs=0.005)
    assert share[2] == 0


# --- fleets ------------------------------------------------------------------------------------------------


class Machine:
    """An executor of a simulation. `lies(number)` says whether it lies about its n-th task."""

    def __init__(self, name: str, lie_percent: int = 0, honest_for: int = 0) -> None:
        self.name = name
        self.lie_percent = lie_percent
        self.honest_for = honest_for
        self.tasks = 0
        self.tasks_until_quarantine: int | None = None
        self.agent = AgentRecord()
        self.record = ExecutorRecord()

    def answer(self, task: int, random: Random) -> str:
        self.tasks += 1
        lie = self.tasks > self.honest_for and random.random() * 100 < self.lie_percent
        return f"lie of {self.name} about {task}" if lie else f"truth of {task}"

    def judged(self, valid: bool) -> None:
        ending: Ending = "valid" if valid else "invalid"
        self.agent, self.record = evolve_agent(self.agent, ending), evolve_executor(self.record, ending)
        if self.record.quarantined and self.tasks_until_quarantine is None:
            self.tasks_until_quarantine = self.tasks


class Run:
    """One task: who made which attempt and what it answered, and how it ended."""

    def __init__(self) -> None:
        self.machines: dict[int, Machine] = {}
        self.answers: dict[int, str] = {}
        self.outcome: Decided | Failed = Failed("")

    @property
    def accepted(self) -> str:
        """The first word of the accepted answer, or `failed`."""
        return self.answers[self.outcome.winner].split()[0] if isinstance(self.outcome, Decided) else "failed"


def run(rule: Rule, task: int, order: list[Machine], random: Random) -> Run:
    """Give one task to machines in this order, which end in any order; what still runs then is cancelled."""
    made = Run()
    there: list[Candidate] = []
    running: list[Producer] = []

    def start() -> None:
        attempt = len(made.machines) + 1
        machine = made.machines[attempt] = order[attempt - 1]
        running.append(Producer(attempt, machine.name, machine.name, machine.name))

    for _ in range(rule.of):
        start()
    while True:
        outcome = judge(rule, there, (), running)
        if isinstance(outcome, Decided | Failed):
            made.outcome = outcome
            return made
        if isinstance(outcome, Extend):
            start()
            continue
        done = running.pop(random.randrange(len(running)))
        key = made.answers[done.attempt] = made.machines[done.attempt].answer(task, random)
        there.append(Candidate(done.attempt, done.executor, done.device, done.owner, f"sha256:{key}", key))


@pytest.mark.parametrize("seed", range(3))
def test_a_quorum_of_two_of_three_accepts_no_lie_of_a_third_that_lies(seed: int) -> None:
    random = Random(seed)
    fleet = [Machine(f"m{one}", 100 if one < 9 else 0) for one in range(30)]
    rule = Rule(k=2, of=3, extend_to=6, distinct="executor")
    ends: Counter[str] = Counter()
    lies = 0
    for task in range(2_000):
        made = run(rule, task, random.sample(fleet, 6), random)
        lies += sum(answer.startswith("lie") for answer in made.answers.values())
        ends[made.accepted] += 1
    assert ends["lie"] == 0
    assert lies > 1_000, "there were lies to accept"
    # Where five of the six are liars, one task in 200, no two agree, and it fails instead of being wrong.
    assert ends["truth"] >= 0.98 * 2_000


class Report:
    """What a simulated fleet did, in all and in its last third."""

    def __init__(self) -> None:
        self.wrong = 0
        self.failed = 0
        self.extra: list[int] = []

    def overhead(self, since: float) -> float:
        tail = self.extra[int(len(self.extra) * since) :]
        return sum(tail) / len(tail)


def simulate(fleet: list[Machine], tasks: int, random: Random) -> Report:
    """Adaptive replication: one attempt where the executor is trusted, and a quorum of two where it is checked."""
    report = Report()
    for task in range(tasks):
        free = [one for one in fleet if not one.record.quarantined]
        chosen = random.sample(free, min(6, len(free)))
        canary = gets_canary(chosen[0].record, random.random())
        if canary:
            chosen[0].judged(chosen[0].answer(-1, random).startswith("truth"))
        checked = is_checked(chosen[0].agent, chosen[0].record, random.random())
        rule = Rule(k=2, of=2, extend_to=6, distinct="executor") if checked else Rule(distinct="executor")
        made = run(rule, task, chosen, random)
        report.extra.append(len(made.machines) - 1 + canary)
        report.wrong += made.accepted == "lie"
        report.failed += made.accepted == "failed"
        if checked and isinstance(made.outcome, Decided):
            for attempt, answer in made.answers.items():
                made.machines[attempt].judged(answer == made.answers[made.outcome.winner])
    return report


@pytest.mark.parametrize("lie_percent", [100, 50])
@pytest.mark.parametrize("seed", range(3))
def test_liars_are_in_quarantine_within_twenty_tasks_and_checking_costs_little(seed: int, lie_percent: int) -> None:
    random = Random(seed)
    fleet = [Machine(f"m{one}", lie_percent if one < 12 else 0) for one in range(40)]
    report = simulate(fleet, 6_000, random)
    until = [one.tasks_until_quarantine for one in fleet[:12]]
    assert all(tasks is not None and tasks <= 20 for tasks in until), until
    assert not any(one.record.quarantined for one in fleet[12:])
    assert report.overhead(since=0.67) <= 0.15
    assert report.wrong == 0
    assert report.failed <= 60
    assert all(one.agent.in_a_row > TRUSTED_AFTER for one in fleet[12:]), "checking goes on"


@pytest.mark.parametrize("seed", range(3))
def test_who_lies_after_a_good_start_is_found_by_the_checks_that_never_end(seed: int) -> None:
    """What this cannot promise: until the first check some of its lies are taken for true."""
    random = Random(seed)
    fleet = [Machine(f"m{one}", 100 if one < 6 else 0, honest_for=60) for one in range(40)]
    report = simulate(fleet, 8_000, random)
    assert all(one.record.quarantined for one in fleet[:6])
    lies = [(one.tasks_until_quarantine or 0) - one.honest_for for one in fleet[:6]]
    assert report.wrong <= sum(lies)
    assert report.wrong <= 6 * 2 / CHECK_MIN
    assert report.overhead(since=0.67) <= 0.15


def test_honest_machines_that_err_now_and_then_stay() -> None:
    random = Random(1)
    fleet = [Machine(f"m{one}", lie_percent=1) for one in range(30)]
    report = simulate(fleet, 6_000, random)
    assert sum(one.record.quarantined for one in fleet) <= 3
    assert report.failed == 0


def test_a_simulation_is_the_same_from_the_same_seed() -> None:
    reports = [
        simulate([Machine(f"m{one}", 50 if one < 3 else 0) for one in range(10)], 300, Random(7)) for _ in "ab"
    ]
    assert reports[0].extra == reports[1].extra
