"""Replicas, quorums, judges and hedges, with a real log and a real bus."""

import asyncio
from collections import Counter
from typing import Any

import msgspec
import pytest
from hive_common.contracts import events
from hive_common.judgement.record import Same, recompute
from hive_proto.jobs.v1 import jobs_pb2

from .conftest import Failure, agent


def job(**words: Any) -> dict[str, Any]:
    task = {"id": "guess", "agent": "guess@1.0.0", "input": {"question": "6 * 7"}, **words}
    document = {"apiVersion": "hive/v1", "kind": "Job", "name": "guesses", "tasks": [task]}
    return {**document, "output": "${tasks.guess.output}"}


def quorum(k: int = 2, of: int = 3, **words: Any) -> dict[str, Any]:
    return {"quorum": {"k": k, "of": of, **words}}


def says(value: Any) -> dict[str, Any]:
    return {"guess": lambda assignment, given: value}


async def slow(assignment: Any, given: Any) -> Any:
    await asyncio.sleep(60)


async def finish(cluster: Any, control: Any, document: dict[str, Any]) -> tuple[Any, list[Any]]:
    """Return a job that has ended, and its events as the log has them."""
    job_id = await control.submit(document)
    ended = await control.finish(job_id)
    return ended, await told_by(cluster, job_id)


async def told_by(cluster: Any, job_id: str) -> list[Any]:
    """Return the events of a job as the log has them."""
    stored = await cluster.reader.read(0, 1_000)
    ours = [one for one in stored if one.correlation == job_id]
    return [(one.stream, events.decode(one.type, one.schema, one.payload)) for one in ours]


async def until(cluster: Any, holds: Any) -> None:
    async with asyncio.timeout(60):
        while not holds(await cluster.log()):
            await asyncio.sleep(0.02)


@pytest.fixture
async def control(cluster: Any, control: Any) -> Any:
    await cluster.publish(*(agent(name) for name in ("guess", "check", "critic", "same", "senior", "vector")))
    return control


def decision(found: list[Any]) -> Any:
    (decided,) = [event for _, event in found if isinstance(event, events.TaskDecided)]
    assert recompute(decided.decision) == Same()
    return decided.decision


async def test_two_of_three_that_agree_decide_and_the_third_is_not_waited_for(cluster, control):
    for name, agents in (("one", says(42)), ("two", says(42)), ("three", {"guess": slow})):
        await cluster.executor(name, agents)
    ended, found = await finish(cluster, control, job(verify=quorum()))
    assert msgspec.json.decode(ended.output_json) == 42
    made = decision(found)
    assert (made.outcome, len(made.votes), len(made.running)) == ("decided", 2, 1)
    assert len({one.executor for one in made.candidates} | {one.executor for one in made.running}) == 3
    types = Counter(type(event).__name__ for _, event in found)
    assert (types["TaskSucceeded"], types["TaskAssigned"]) == (1, 3)


async def test_one_more_attempt_is_made_where_nobody_agrees_while_there_is_somebody_to_make_it(cluster, control):
    answers = {"guess": lambda assignment, given: assignment.attempt % 3}
    for name in ("one", "two", "three", "four"):
        await cluster.executor(name, answers)
    ended, found = await finish(cluster, control, job(verify=quorum()))
    assert msgspec.json.decode(ended.output_json) == 1
    made = decision(found)
    assert made.votes == (1, 4)
    assert len({one.device for one in made.candidates}) == 4
    assert [event.reason for _, event in found if isinstance(event, events.TaskExtended)] == ["extend"]


async def test_no_more_attempts_are_made_than_there_are_devices(cluster, control):
    answers = {"guess": lambda assignment, given: assignment.attempt}
    for name in ("one", "two", "three"):
        await cluster.executor(name, answers)
    ended, found = await finish(cluster, control, job(verify=quorum()))
    assert (ended.state, ended.error_code) == ("failed", "no_quorum")
    assert len(decision(found).candidates) == 3


async def test_a_task_fails_where_results_do_not_agree(cluster, control):
    for name, value in (("one", 1), ("two", 2)):
        await cluster.executor(name, says(value))
    ended, found = await finish(cluster, control, job(verify=quorum(of=2, on_none="fail")))
    assert (ended.state, ended.error_code) == ("failed", "no_quorum")
    assert decision(found).outcome == "failed"


async def test_the_first_that_a_test_passes_decides_and_losers_are_stopped(cluster, control):
    def judge(assignment: Any, given: Any) -> Any:
        return {"passed": given["output"] == 42, "why": "6 * 7 = 42"}

    for name, agents in (
        ("one", says(41)),
        ("two", says(42)),
        ("three", {"guess": slow}),
        ("four", {"guess": slow}),
    ):
        await cluster.executor(name, {**agents, "check": judge})
    words = {"speculate": {"replicas": 4}, "verify": {"test": {"agent": "check@1.0.0"}}}
    ended, found = await finish(cluster, control, job(**words))
    assert msgspec.json.decode(ended.output_json) == 42
    made = decision(found)
    assert {one.passed for one in made.candidates} <= {True, False, None}
    places = {one.attempt: one.executor for one in made.candidates}
    assert all(places[attempt] != one.by.executor for one in made.judges for attempt in one.judged)


async def test_a_critic_gives_scores_and_what_is_below_the_least_does_not_count(cluster, control):
    def critic(assignment: Any, given: Any) -> Any:
        return {"score": given["output"]}

    for name, value in (("one", 0.2), ("two", 0.9), ("three", 0.1)):
        await cluster.executor(name, {"critic": critic, **says(value)})
    words = {
        "speculate": {"replicas": 3},
        "verify": {"critic": {"agent": "critic@1.0.0", "min_score": 0.5}},
    }
    ended, found = await finish(cluster, control, job(**words))
    assert msgspec.json.decode(ended.output_json) == 0.9
    assert {one.score for one in decision(found).candidates} >= {0.9}


async def test_pairs_that_a_critic_calls_equal_are_votes(cluster, control):
    def same(assignment: Any, given: Any) -> Any:
        return {"equal": given["a"].lower() == given["b"].lower()}

    words = ("Paris", "PARIS", "Rome")
    await cluster.executor("one", {"same": same, "guess": lambda assignment, given: words[assignment.attempt - 1]})
    document = job(
        verify=quorum(equal={"critic": {"agent": "same@1.0.0"}}), speculate={"distinct": "none", "replicas": 3}
    )
    ended, found = await finish(cluster, control, document)
    assert msgspec.json.decode(ended.output_json) == "Paris"
    assert decision(found).votes == (1, 2)


NEAR = {"Paris": [1.0, 0.0], "Paris, France": [0.9, 0.1], "Rome": [0, 2]}


def near(**words: Any) -> dict[str, Any]:
    return quorum(equal={"embedding": {"min": 0.95, "agent": "vector@1.0.0"}}, **words)


async def test_results_with_vectors_that_are_near_are_votes_and_each_is_turned_into_one_once(cluster, control):
    def vector(assignment: Any, given: Any) -> Any:
        assert given["input"] == {"question": "6 * 7"}
        return {"vector": NEAR[given["output"]]}

    words = [*NEAR]
    answers = {"vector": vector, "guess": lambda assignment, given: words[(assignment.attempt + 1) % 3]}
    for name in ("one", "two", "three"):
        await cluster.executor(name, answers)
    # Rome comes first, and the other two have the votes.
    ended, found = await finish(cluster, control, job(verify=near(on_none="fail")))
    made = decision(found)
    outputs = {
        event.attempt: msgspec.json.decode(event.output.raw)
        for stream, event in found
        if stream == made.task and isinstance(event, events.AttemptSucceeded)
    }
    assert sorted(outputs[attempt] for attempt in made.votes) == ["Paris", "Paris, France"]
    assert msgspec.json.decode(ended.output_json) == outputs[made.winner] == outputs[min(made.votes)]
    assert {(pair.a, pair.b): pair.equal for pair in made.pairs} == {
        pair: set(pair) == set(made.votes) for pair in ((1, 2), (1, 3), (2, 3))
    }
    assert [(one.kind, one.agent) for one in made.judges] == [("vector", "vector@1.0.0")] * 3
    assert sorted(one.judged for one in made.judges) == [(1,), (2,), (3,)]
    places = {one.attempt: one.executor for one in made.candidates}
    assert all(places[attempt] != one.by.executor for one in made.judges for attempt in one.judged)
    asked = [event.judging for _, event in found if isinstance(event, events.TaskCreated) and event.judging]
    assert len(asked) == len(set(asked)) == 3


async def test_vectors_that_were_made_before_a_new_leader_are_read_from_the_log(cluster, control):
    gate = asyncio.Event()

    async def vector(assignment: Any, given: Any) -> Any:
        if given["output"] != "Paris":
            await gate.wait()
        return {"vector": NEAR[given["output"]]}

    words = ["Paris", "Paris, France"]
    answers = {"vector": vector, "guess": lambda assignment, given: words[assignment.attempt - 1]}
    await cluster.executor("one", answers, slots=8)
    document = job(verify=near(of=2, on_none="fail"), speculate={"distinct": "none", "replicas": 2})
    job_id = await control.submit(document)
    # Guesses and one vector are there, and the other vector is being made.
    await until(cluster, lambda stored: sum(one.type == "AttemptSucceeded" for one in stored) == 3)
    await until(cluster, lambda stored: sum(one.type == "TaskAssigned" for one in stored) == 4)
    await control.shut_down()
    await control.start()
    gate.set()
    ended = await control.finish(job_id)
    assert msgspec.json.decode(ended.output_json) == "Paris"
    stored = await cluster.reader.read(0, 1_000)
    made = decision([(one.stream, events.decode(one.type, one.schema, one.payload)) for one in stored])
    assert (made.votes, len(made.judges)) == ((1, 2), 2)


async def test_an_answer_that_is_no_vector_fails_what_it_was_made_of(cluster, control):
    nowhere = {"vector": lambda assignment, given: {"vector": [0, 0.0]}}
    await cluster.executor("one", {**nowhere, "guess": lambda assignment, given: assignment.attempt})
    document = job(verify=near(of=2), speculate={"distinct": "none", "replicas": 2})
    ended, _ = await finish(cluster, control, document)
    assert (ended.state, ended.error_code) == ("failed", "judge_failed")
    assert "not all of them zero" in ended.error_message


async def test_a_senior_agent_chooses_where_nobody_agrees(cluster, control):
    def senior(assignment: Any, given: Any) -> Any:
        return {"choice": given["candidates"].index(2)}

    await cluster.executor("one", {"senior": senior, "guess": lambda assignment, given: assignment.attempt})
    words = {
        "verify": {**quorum(of=2, on_none="escalate"), "senior": {"agent": "senior@1.0.0"}},
        "speculate": {"distinct": "none", "replicas": 2},
    }
    ended, found = await finish(cluster, control, job(**words))
    assert msgspec.json.decode(ended.output_json) == 2
    assert decision(found).outcome == "escalated"


async def test_all_results_are_kept(cluster, control):
    await cluster.executor("one", {"guess": lambda assignment, given: assignment.attempt})
    words = {"speculate": {"replicas": 3, "keep": "all", "distinct": "none"}}
    ended, found = await finish(cluster, control, job(**words))
    assert msgspec.json.decode(ended.output_json) == [1, 2, 3]
    assert decision(found).outcome == "kept"


async def test_a_slow_attempt_gets_a_second_one_beside_it_and_is_stopped(cluster, control):
    async def first_is_slow(assignment: Any, given: Any) -> Any:
        await asyncio.sleep(60 if assignment.attempt == 1 else 0)
        return "fast"

    for name in ("one", "two"):
        await cluster.executor(name, {"guess": first_is_slow})
    words = {"replicas": 2, "hedge_after": "100ms", "distinct": "executor"}
    ended, found = await finish(cluster, control, job(speculate=words))
    assert msgspec.json.decode(ended.output_json) == "fast"
    assert (decision(found).winner, [one.attempt for one in decision(found).running]) == (2, [1])
    await until(cluster, lambda _: not any(executor.held for executor in cluster.executors))


async def test_one_whose_result_does_not_pass_gets_the_next_at_once(cluster, control):
    def judge(assignment: Any, given: Any) -> Any:
        return {"passed": given["output"] == 3}

    answers = {"guess": lambda assignment, given: assignment.attempt, "check": judge}
    await cluster.executor("one", answers)
    words = {"speculate": {"replicas": 3, "hedge_after": "60s", "distinct": "none"}}
    ended, found = await finish(cluster, control, job(**words, verify={"test": {"agent": "check@1.0.0"}}))
    assert msgspec.json.decode(ended.output_json) == 3
    assert [one.passed for one in decision(found).candidates] == [False, False, True]


async def test_a_quick_attempt_gets_none_beside_it(cluster, control):
    await cluster.executor("one", says("fast"))
    words = {"replicas": 2, "hedge_after": "60s", "distinct": "none"}
    _, found = await finish(cluster, control, job(speculate=words))
    assert Counter(type(event).__name__ for _, event in found)["TaskAssigned"] == 1


async def test_attempts_that_fail_are_made_again_and_the_rest_is_judged(cluster, control):
    def breaks_once(assignment: Any, given: Any) -> Any:
        if assignment.attempt == 1:
            raise Failure("agent_error", "not today")
        return 42

    await cluster.executor("one", {"guess": breaks_once}, slots=1)
    words = {
        "speculate": {"replicas": 2, "distinct": "none"},
        "verify": quorum(of=2),
        "retry": {"max_attempts": 2, "backoff": "1ms"},
    }
    ended, found = await finish(cluster, control, job(**words))
    assert msgspec.json.decode(ended.output_json) == 42
    assert decision(found).spent == 0


async def test_a_judge_that_fails_fails_what_it_was_to_judge(cluster, control):
    def broken(assignment: Any, given: Any) -> Any:
        return {"verdict": "fine"}

    await cluster.executor("one", {"critic": broken, **says(1)})
    words = {"verify": {"critic": {"agent": "critic@1.0.0"}}, "speculate": {"distinct": "none"}}
    ended, _ = await finish(cluster, control, job(**words))
    assert (ended.state, ended.error_code) == ("failed", "judge_failed")
    assert "score" in ended.error_message


async def test_a_result_that_does_not_fit_the_schema_of_the_job_is_a_failed_attempt(cluster, control):
    await cluster.executor("one", says("forty-two"))
    ended, _ = await finish(cluster, control, job(verify={"schema": {"type": "integer"}}))
    assert (ended.state, ended.error_code) == ("failed", "invalid_output")


async def test_a_cancelled_job_ends_with_all_its_attempts_and_judges(cluster, control):
    async def thinks(assignment: Any, given: Any) -> Any:
        await asyncio.sleep(60)

    await cluster.executor("one", {"critic": thinks, **says(1)})
    words = {"verify": {"critic": {"agent": "critic@1.0.0"}}, "speculate": {"distinct": "none", "replicas": 2}}
    job_id = await control.submit(job(**words))
    await until(cluster, lambda stored: sum(one.type == "TaskCreated" for one in stored) >= 2)
    await control.rpc("Cancel", jobs_pb2.CancelRequest(job_id=job_id, reason="enough"))
    ended = await control.finish(job_id)
    assert ended.state == "cancelled"


@pytest.mark.parametrize("replicas", [2, 5])
async def test_what_a_new_leader_reads_from_the_log_goes_on(cluster, control, replicas):
    gate = asyncio.Event()

    async def waits(assignment: Any, given: Any) -> Any:
        await gate.wait()
        return 42

    await cluster.executor("one", {"guess": waits}, slots=8)
    words = {"verify": quorum(k=2, of=replicas), "speculate": {"distinct": "none", "replicas": replicas}}
    job_id = await control.submit(job(**words))
    await until(cluster, lambda stored: sum(one.type == "TaskAssigned" for one in stored) == replicas)
    await control.shut_down()
    await control.start()
    gate.set()
    ended = await control.finish(job_id)
    assert msgspec.json.decode(ended.output_json) == 42
