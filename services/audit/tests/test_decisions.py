"""Decisions are checked again: what holds is the same, and each thing that was tampered with is found."""

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_audit.decision_checks import check_decision, decisions
from hive_audit.log_source import LogSource
from hive_audit.rules import rule_of
from hive_common.artifacts.store import FolderStore
from hive_common.contracts.events import AttemptSucceeded, TaskFailed, TaskSucceeded
from hive_common.contracts.jobdocument import Task
from hive_common.contracts.judgement import Decision, Pair, PairCritic, Rule
from hive_common.contracts.values import by_digest, inline
from hive_common.kernel.errors import NotFound
from hive_common.kernel.ids import new_id
from hive_common.testing.fixtures import Database

from .conftest import Tamper
from .judged import CRITIC, FAILED_AND_REPLACED, TASK, Case, assigned, producer, quorum

ONE, TWO = {"n": 1}, {"n": 2}


def quorum_case(task: dict[str, Any] | None = None, outputs: tuple[Any, ...] = (ONE, TWO, ONE)) -> Case:
    words = quorum() if task is None else task
    return Case(words, rule_of(msgspec.convert(words, Task)), outputs)


def scored_case() -> Case:
    words = quorum()
    words["verify"] |= {"critic": {"agent": CRITIC, "min_score": 0.5}, "test": {"agent": CRITIC}}
    case = quorum_case(words, (ONE, TWO, ONE))
    for attempt in (1, 2, 3):
        case.scored(attempt, "score", 0.75)
        case.scored(attempt, "passed", True)
    return case


def judged_case() -> Case:
    """Two results that a critic scores, a test passes, and a third agent calls equal."""
    words = quorum(of=2, equal={"critic": {"agent": CRITIC}})
    words["verify"] |= {"critic": {"agent": CRITIC, "min_score": 0.5}, "test": {"agent": CRITIC}}
    case = quorum_case(words, (ONE, TWO))
    assert isinstance(case.rule.equal, PairCritic)
    for attempt in (1, 2):
        case.scored(attempt, "score", 0.75)
        case.scored(attempt, "passed", True)
    case.asked("pairs", (1, 2), {"equal": True})
    case.pairs = [Pair(1, 2, True)]
    return case


def vector_case() -> Case:
    """Three results of which two have vectors that are near."""
    equal = {"embedding": {"min": 0.9, "agent": CRITIC}}
    case = quorum_case(quorum(equal=equal), (ONE, TWO, {"n": 3}))
    for attempt, vector in enumerate(VECTORS, 1):
        case.asked("vector", (attempt,), {"vector": vector, "model": "m"})
    case.pairs = [Pair(1, 2, True), Pair(1, 3, False), Pair(2, 3, False)]
    return case


VECTORS = ([1, 0], [0.9, 0.1], [0.0, 1.0])


async def test_pairs_are_compared_again_from_the_vectors_in_the_log(auditor):
    assert await auditor.check(case := vector_case()) == ("same", "")
    assert case.decision().votes == (1, 2)
    case = vector_case()
    case.pairs = [Pair(1, 2, False), Pair(1, 3, False), Pair(2, 3, True)]
    result, why = await auditor.check(case)
    assert result == "differs"
    assert "attempts 1 and 2 are equal, and recorded is the contrary" in why
    assert "attempts 2 and 3 are not equal, and recorded is the contrary" in why
    assert "1 and 3" not in why


async def test_a_vector_that_nobody_is_named_for_or_that_is_none_is_found(auditor):
    case = vector_case()
    decision = case.decision()
    result, why = await auditor.check(case, msgspec.structs.replace(decision, judges=decision.judges[1:]))
    assert result == "differs" and "nobody is named for the verdict (vector) on attempts [" in why
    case = vector_case()
    made = [*case.judge_events.values()][2]
    made[2] = AttemptSucceeded(1, inline(b'{"vector":"far"}'))
    assert await auditor.check(case) == ("not_checkable", "there is no vector of attempt 3")
    case = vector_case()
    made = [*case.judge_events.values()][1]
    made[0] = msgspec.structs.replace(made[0], input=inline(b'{"input":{"n":1},"output":{"n":7}}'))
    result, why = await auditor.check(case)
    assert result == "differs" and "was given something else than the result of attempt 2" in why


async def test_vectors_are_not_made_where_the_result_came_from(auditor):
    case = vector_case()
    case.judges, case.judge_events = [], {}
    for attempt, vector in enumerate(VECTORS, 1):
        case.asked("vector", (attempt,), {"vector": vector}, by=1)
    result, why = await auditor.check(case)
    assert result == "differs" and "produced_what_it_judges" in why


def escalated_case() -> Case:
    words = quorum(of=2, on_none="escalate")
    words["verify"] |= {"senior": {"agent": CRITIC}}
    case = quorum_case(words, (ONE, TWO))
    case.asked("senior", (1, 2), {"choice": 1})
    case.chosen = 2
    return case


class Auditor:
    """Checks decisions of a log, with a store of blobs."""

    def __init__(self, database: Database, folder: Path) -> None:
        self.database = database
        self.store = FolderStore(folder)

    async def check(self, case: Case, decision: Decision | None = None) -> tuple[str, str]:
        """Write a case, and return what came of checking it."""
        return await self.again(await case.write(self.database, decision))

    async def again(self, task: str) -> tuple[str, str]:
        async with await LogSource.open(self.database.role_dsn("audit")) as source:
            found = await check_decision(source, self.store, task)
        return found.result, "; ".join(found.reasons)


@pytest.fixture
def auditor(database: Database, tmp_path: Path) -> Auditor:
    return Auditor(database, tmp_path / "artifacts")


async def test_what_the_rule_gives_is_the_same(auditor):
    nobody_agrees = quorum_case(outputs=(ONE, TWO, {"n": 3}))
    kept_words = {**TASK, "speculate": {"replicas": 2, "keep": "all", "distinct": "executor"}}
    kept = quorum_case(kept_words, (ONE, TWO))
    for case in (quorum_case(), scored_case(), escalated_case(), nobody_agrees, kept):
        assert await auditor.check(case) == ("same", "")
    assert nobody_agrees.decision().outcome == "failed"


async def test_an_early_decision_with_an_attempt_that_ran(auditor):
    case = quorum_case(outputs=(ONE, ONE))
    case.replicas, case.running = 3, [producer(3)]
    assert await auditor.check(case) == ("same", "")
    case = quorum_case(outputs=(ONE, ONE))
    case.replicas = 3
    result, why = await auditor.check(case, msgspec.structs.replace(case.decision(), running=(producer(3),)))
    assert result == "differs" and "running" in why


def changed(case: Case, at: int, **fields: Any) -> Decision:
    """Return the decision with another candidate in one's place."""
    decision = case.decision()
    candidates = [*decision.candidates]
    candidates[at] = msgspec.structs.replace(candidates[at], **fields)
    return msgspec.structs.replace(decision, candidates=tuple(candidates))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"digest": "sha256:" + "0" * 64}, "candidates: attempt 1 gave sha256:"),
        ({"executor": "executor-7"}, "its executor was executor-1, and recorded is executor-7"),
        ({"device": "device-7"}, "its device was device-1, and recorded is device-7"),
        ({"owner": "owner-7"}, "its owner was owner-1, and recorded is owner-7"),
        ({"key": "sha256:" + "0" * 64}, "attempt 1 has another key"),
        ({"attempt": 4}, "candidates: attempt 4 did not succeed"),
    ],
)
async def test_a_candidate_that_is_another_is_found(auditor, fields, said):
    result, why = await auditor.check(case := quorum_case(), changed(case, 0, **fields))
    assert result == "differs" and said in why


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"score": 0.9}, "score: attempt 1 was given 0.75, and recorded is 0.9"),
        ({"score": None}, "score: attempt 1 was given 0.75, and recorded is nothing"),
        ({"passed": False}, "passed: attempt 1 was given true, and recorded is false"),
    ],
)
async def test_a_verdict_that_no_judge_gave_is_found(auditor, fields, said):
    result, why = await auditor.check(case := judged_case(), changed(case, 0, **fields))
    assert result == "differs" and said in why


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"winner": 2}, "winner: recorded is 2, and the rule gives 1"),
        ({"votes": (1, 2)}, "votes: recorded is [1,2]"),
        ({"task": new_id()}, "the decision stands in the stream of"),
        ({"coming": 1}, "coming: recorded is 1, and by the log it was 0"),
        ({"spent": 1}, "spent: recorded is 1, and by the log it was 0"),
        ({"gone": 1}, "gone: recorded is 1, of 0 that were to come"),
        ({"rule": Rule(k=1, of=3, distinct="executor", on_none="fail")}, "rule: k is 1, and the job asks for 2"),
        ({"rule": Rule(k=2, of=3, distinct="none", on_none="fail")}, 'rule: distinct is "none"'),
    ],
)
async def test_a_record_that_says_something_else_is_found(auditor, fields, said):
    case = quorum_case()
    result, why = await auditor.check(case, msgspec.structs.replace(case.decision(), **fields))
    assert result == "differs" and said in why


async def test_a_result_that_is_left_out_is_found(auditor):
    case = quorum_case(outputs=(ONE, ONE, TWO))
    decision = case.decision()
    left_out = msgspec.structs.replace(decision, candidates=decision.candidates[:2])
    result, why = await auditor.check(case, left_out)
    assert result == "differs" and "attempt 3 succeeded before the decision and is none" in why


@pytest.mark.parametrize(
    ("pairs", "said"),
    [((Pair(1, 2, False),), "equal false was only recorded"), ((), "equal true was only answered")],
)
async def test_a_pair_that_nobody_called_equal_is_found(auditor, pairs, said):
    case = judged_case()
    result, why = await auditor.check(case, msgspec.structs.replace(case.decision(), pairs=pairs))
    assert result == "differs" and said in why


async def test_what_a_critic_calls_equal_is_said_by_nobody_else(auditor):
    result, why = await auditor.check(judged_case())
    assert result == "not_checkable" and "asking again could give another answer" in why


@pytest.mark.parametrize(
    ("vector", "result", "said"),
    [
        ([1.0, 0.1], "same", ""),
        ([0.0, 1.0], "differs", "attempts 1 and 2 are not equal, and recorded is the contrary"),
        ("none", "not_checkable", "there is no vector of attempt 2"),
    ],
)
async def test_results_are_compared_by_the_vectors_that_were_made_of_them(auditor, vector, result, said):
    case = quorum_case(quorum(of=2, equal={"embedding": {"min": 0.9, "agent": CRITIC}}), (ONE, TWO))
    case.asked("vector", (1,), {"vector": [1.0, 0.0]})
    case.asked("vector", (2,), {"vector": vector})
    case.pairs = [Pair(1, 2, True)]
    found, why = await auditor.check(case)
    assert (found, said in why) == (result, True), why


async def test_another_end_than_what_was_decided_is_found(auditor):
    case = quorum_case()
    for end, said in (
        (TaskSucceeded(2), "attempt 1 won, and the task took attempt 2"),
        (TaskFailed("no_quorum"), "attempt 1 won, and the task did not succeed"),
    ):
        case = quorum_case()
        case.end = end
        result, why = await auditor.check(case)
        assert result == "differs" and said in why
    case = quorum_case(outputs=(ONE, TWO, {"n": 3}))
    case.end = TaskFailed("agent_error")
    assert "the task failed with agent_error, and decided was no_quorum" in (await auditor.check(case))[1]


async def test_another_choice_than_that_of_the_senior_agent_is_found(auditor):
    case = escalated_case()
    case.chosen = 1
    result, why = await auditor.check(case)
    assert result == "differs" and "winner: the senior agent chose 2, and recorded is 1" in why


@pytest.mark.parametrize(
    ("number", "event", "said"),
    [
        (0, lambda one: msgspec.structs.replace(one, agent="other@1.0.0"), "is of agent other@1.0.0"),
        (0, lambda one: msgspec.structs.replace(one, judging=None), "was asked something else: nothing"),
        (0, lambda one: msgspec.structs.replace(one, input=inline(b'{"output":3}')), "was given something else"),
        (1, lambda one: msgspec.structs.replace(one, executor="executor-1"), "its executor was executor-1"),
        (2, lambda one: AttemptSucceeded(1, inline(b'{"score":0.1}')), "was given 0.1, and recorded is 0.75"),
        (3, lambda one: TaskFailed("agent_error"), "attempt 1 had not decided it"),
    ],
)
async def test_a_judge_that_was_another_is_found(auditor, number, event, said):
    case = judged_case()
    made = case.judge_events[case.judges[0].task]
    made[number] = event(made[number])
    result, why = await auditor.check(case)
    assert result == "differs" and said in why


@pytest.mark.parametrize(
    ("case", "kind"),
    [
        (judged_case, "critic"),
        (judged_case, "test"),
        (judged_case, "pairs"),
        (vector_case, "vector"),
        (escalated_case, "senior"),
    ],
)
async def test_a_judge_that_the_job_does_not_name_is_found(auditor, case, kind):
    made = case()
    at = next(number for number, one in enumerate(made.judges) if one.kind == kind)
    judge = made.judges[at] = msgspec.structs.replace(made.judges[at], agent="other@1.0.0")
    events = made.judge_events[judge.task]
    events[0] = msgspec.structs.replace(events[0], agent="other@1.0.0")
    result, why = await auditor.check(made)
    assert result == "differs"
    assert why == f"judges: other@1.0.0 ({kind}, task {judge.task}) was asked, and the job names {CRITIC}"


async def test_a_judge_that_nobody_asked_for_is_found(auditor):
    case = quorum_case()
    case.asked("critic", (1,), {"score": 1.0})
    result, why = await auditor.check(case)
    assert result == "differs" and "was asked, and the job names nobody" in why


async def test_a_judge_that_does_not_exist_is_found(auditor):
    case = judged_case()
    del case.judge_events[case.judges[0].task]
    result, why = await auditor.check(case)
    assert result == "differs" and "there is no task" in why


async def test_a_judge_of_its_own_work_is_found(auditor):
    case = quorum_case({**TASK, "verify": {"critic": {"agent": CRITIC}}}, (ONE,))
    case.asked("critic", (1,), {"score": 1.0}, by=1)
    case.candidates[0] = msgspec.structs.replace(case.candidates[0], score=1.0)
    result, why = await auditor.check(case)
    assert result == "differs" and "produced_what_it_judges" in why


async def test_blobs_are_compared_where_they_exist(auditor):
    large = {"text": "x" * 5_000}
    case = quorum_case(outputs=(large, large, ONE))
    digest = await auditor.store.put(case.payloads[1])
    case.values |= {1: by_digest(case.payloads[1]), 2: by_digest(case.payloads[2])}
    assert await auditor.check(case) == ("same", "")
    await auditor.store.delete(digest)
    result, why = await auditor.again(case.task)
    assert result == "not_checkable"
    assert f"the result of attempt 1 ({digest}) does not exist any more" in why


async def test_what_contradicts_is_found_also_where_payloads_are_gone(auditor):
    large = {"text": "x" * 5_000}
    case = quorum_case(outputs=(large, large, ONE))
    case.values |= {1: by_digest(case.payloads[1]), 2: by_digest(case.payloads[2])}
    result, why = await auditor.check(case, msgspec.structs.replace(case.decision(), winner=3))
    assert result == "differs" and "winner: recorded is 3" in why


async def test_what_a_judge_answered_and_is_gone_is_not_checkable(auditor):
    case = scored_case()
    stream = case.judges[0].task
    case.judge_events[stream][2] = AttemptSucceeded(1, by_digest(b'{"score":0.75}'))
    result, why = await auditor.check(case)
    assert result == "not_checkable" and f"(critic, task {stream}) answered does not exist any more" in why


async def test_a_damaged_blob_is_a_difference(auditor, tmp_path):
    case = quorum_case(outputs=(ONE, ONE, TWO))
    digest = await auditor.store.put(case.payloads[1])
    (tmp_path / "artifacts" / "blobs" / "sha256" / digest.removeprefix("sha256:")).write_bytes(b'{"n":9}')
    case.values |= {1: by_digest(case.payloads[1]), 2: by_digest(case.payloads[2])}
    result, why = await auditor.check(case)
    assert result == "differs" and "damaged" in why


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        (
            "UPDATE log.payloads p SET payload ="
            " replace(convert_from(payload, 'UTF8'), '\"winner\":1', '\"winner\":3')::bytea"
            " FROM log.events e WHERE e.position = p.position AND e.type = 'TaskDecided'",
            "payload or salt is not what the envelope commits to",
        ),
        (
            "UPDATE log.events SET hash = sha256('x') WHERE type = 'TaskDecided'",
            "the hash is not that of the event's bytes",
        ),
        ("UPDATE log.events SET hash = sha256('x') WHERE type = 'TaskSucceeded'", "the hash is not that of"),
        ("DELETE FROM log.events WHERE type = 'AttemptSucceeded' AND version = 5", "is missing"),
    ],
)
async def test_rows_that_were_changed_are_found(auditor, tamper: Tamper, statement, said):
    task = await quorum_case().write(auditor.database)
    tamper(statement)
    result, why = await auditor.again(task)
    assert result == "differs" and said in why


async def test_a_rewritten_row_does_not_fit_those_beside_it(auditor, tamper: Tamper):
    task = await quorum_case().write(auditor.database)
    await quorum_case().write(auditor.database)
    tamper(
        "UPDATE log.events SET event = replace(convert_from(event, 'UTF8'), '\"scheduler\"', '\"somebody\"')::bytea"
        " WHERE type = 'TaskDecided'",
        "UPDATE log.events SET hash = sha256('\\x00'::bytea || event) WHERE type = 'TaskDecided'",
    )
    result, why = await auditor.again(task)
    assert result == "differs" and "names another hash" in why


async def test_who_is_trusted_and_who_is_alone_are_judged_by_less(auditor):
    case = quorum_case(words := quorum(adaptive=True, on_none="extend"), (ONE,))
    case.rule = Rule(k=1, of=1, distinct="executor", on_none="extend")
    case.candidates = [msgspec.structs.replace(case.candidates[0], key="")]
    case.trust = 12
    assert await auditor.check(case) == ("same", "")
    for trust in (0, 9):
        case = quorum_case(words, (ONE,))
        case.rule, case.trust = Rule(k=1, of=1, distinct="executor", on_none="extend"), trust
        case.candidates = [msgspec.structs.replace(case.candidates[0], key="")]
        result, why = await auditor.check(case)
        assert result == "differs" and "rule: k is 1, and the job asks for 2" in why
    case = quorum_case(quorum(on_none="extend"), (ONE, TWO, {"n": 3}))
    case.rule = msgspec.structs.replace(case.rule, extend_to=0, on_none="fail")
    assert await auditor.check(case) == ("same", "")


async def test_what_nobody_was_left_for_is_waited_for_by_no_rule(auditor):
    case = quorum_case(quorum(of=4), (ONE, TWO, ONE))
    case.replicas = 4
    assert await auditor.check(case, msgspec.structs.replace(case.decision(), coming=1, gone=1)) == ("same", "")
    case = quorum_case(quorum(of=4), (ONE, TWO, ONE))
    case.replicas = 4
    result, why = await auditor.check(case, msgspec.structs.replace(case.decision(), coming=1))
    assert result == "differs" and "the rule gives no decision yet: wait" in why


async def test_a_failed_attempt_and_the_one_in_its_place(auditor):
    case = quorum_case(outputs=(ONE, ONE))
    case.replicas = 3
    case.before = [*FAILED_AND_REPLACED, assigned(producer(4), 4)]
    decision = msgspec.structs.replace(case.decision(), running=(producer(4),))
    assert await auditor.check(case, decision) == ("same", "")
    case = quorum_case(outputs=(ONE, ONE))
    case.replicas = 3
    case.before = [*FAILED_AND_REPLACED[:2]]
    result, why = await auditor.check(case)
    assert result == "differs" and "spent: recorded is 0, and by the log it was 1" in why


async def test_all_of_a_job_and_all_of_the_log(auditor):
    cases = [quorum_case(), scored_case(), quorum_case()]
    for case in cases[:2]:
        await case.write(auditor.database)
    await cases[2].write(auditor.database, msgspec.structs.replace(cases[2].decision(), winner=2))
    async with await LogSource.open(auditor.database.role_dsn("audit")) as source:
        everything = [one async for one in decisions(source, auditor.store, "", 0, 10)]
        assert [(one.task, one.job, one.result) for one in everything] == [
            (case.task, case.job, "differs" if case is cases[2] else "same") for case in cases
        ]
        rest = [one.task async for one in decisions(source, auditor.store, "", everything[0].position, 1)]
        assert rest == [cases[1].task]
        of_one = [one.task async for one in decisions(source, auditor.store, cases[1].job, 0, 10)]
        assert of_one == [cases[1].task]
        for task in (new_id(), cases[0].job):
            with pytest.raises(NotFound):
                await check_decision(source, auditor.store, task)
        with pytest.raises(NotFound):
            [one async for one in decisions(source, auditor.store, new_id(), 0, 10)]


def test_the_rule_of_a_task_with_few_words():
    words = msgspec.convert({**TASK, "verify": {"critic": {"agent": CRITIC}}}, Task)
    assert rule_of(words) == Rule(min_score=0.0, on_none="fail")
    assert rule_of(msgspec.convert(quorum(on_none="extend"), Task)).extend_to == 6
