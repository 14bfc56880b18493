"""Joins and partial results, with a real log and a real bus."""

import asyncio
from typing import Any

import msgspec
import pytest
from hive_common.contracts import events
from hive_common.contracts.events import StepJoined, TaskCancelled
from hive_common.kernel.clock import SystemClock
from hive_scheduler.domain.job import snapshot
from hive_scheduler.recovery import PostgresOpenJobs, recover, replay
from hive_scheduler.submission import Specs
from psycopg import AsyncConnection

from .conftest import Failure, agent

OUTPUT = "${tasks.work.output}"


def job(*tasks: dict[str, Any], deadline: str = "60s", output: Any = OUTPUT) -> dict[str, Any]:
    document = {"apiVersion": "hive/v1", "kind": "Job", "name": "joins", "limits": {"deadline": deadline}}
    return {**document, "tasks": list(tasks), "output": output}


def work(**words: Any) -> dict[str, Any]:
    return {"id": "work", "agent": "work@1.0.0", "fork": "${input}", "input": "${item}", **words}


def integrator(**words: Any) -> dict[str, Any]:
    return {"join": {"integrator": {"agent": "sum@1.0.0", **words}}}


@pytest.fixture
async def control(cluster: Any, control: Any) -> Any:
    await cluster.publish(*(agent(name) for name in ("work", "sum", "last")))
    return control


async def never(assignment: Any, given: Any) -> Any:
    await asyncio.sleep(600)


def works(assignment: Any, given: Any) -> Any:
    """Give back what is given; a text is a failure, a negative number never ends."""
    if isinstance(given, str):
        raise Failure(given)
    return never(assignment, given) if given < 0 else given


def sums(assignment: Any, given: Any) -> Any:
    good = [one["value"] for one in given["results"] if one["status"] == "succeeded"]
    return {"sum": sum(good), "partial": given["partial"], "of": given["size"]}


AGENTS = {"work": works, "sum": sums, "last": lambda assignment, given: given}


async def log_of(cluster: Any, job_id: str) -> list[tuple[str, Any]]:
    stored = await cluster.reader.read(0, 1_000)
    ours = [one for one in stored if one.correlation == job_id]
    return [(one.stream, events.decode(one.type, one.schema, one.payload)) for one in ours]


async def finish(cluster: Any, control: Any, document: dict[str, Any], given: Any) -> tuple[Any, StepJoined | None]:
    """Return a job that has ended, and how its step was joined."""
    job_id = await control.submit(document, input_json=msgspec.json.encode(given))
    ended = await control.finish(job_id)
    joined = [event for _, event in await log_of(cluster, job_id) if isinstance(event, StepJoined)]
    assert len(joined) <= 1
    return ended, joined[0] if joined else None


async def test_an_integrator_gets_what_succeeded_and_its_output_is_the_steps(cluster, control):
    await cluster.executor("one", AGENTS)
    last = {"id": "last", "agent": "last@1.0.0", "needs": ["work"], "input": OUTPUT}
    document = job(work(on_failure="skip", **integrator()), last, output="${tasks.last.output}")
    ended, joined = await finish(cluster, control, document, [1, "agent_error", 3])
    assert ended.state == "succeeded", ended.error_message
    assert msgspec.json.decode(ended.output_json) == {"sum": 4, "partial": True, "of": 3}
    assert joined is not None
    assert (joined.order, joined.missing, joined.closed) == ((0, 2), (1,), False)


async def test_most_results_win_a_vote(cluster, control):
    await cluster.executor("one", AGENTS)
    ended, joined = await finish(cluster, control, job(work(join="vote")), [7, 8, 7.0, 9])
    assert msgspec.json.decode(ended.output_json) == 7
    assert joined is not None
    assert (joined.order, joined.votes) == ((0,), (0, 2))


async def test_too_few_results_fail_the_job_and_end_what_runs(cluster, control):
    await cluster.executor("one", AGENTS)
    ended, _ = await finish(cluster, control, job(work(on_failure="skip", minimum=2)), [-1, "trap", "trap"])
    assert (ended.state, ended.error_code) == ("failed", "too_few_results")
    assert ended.error_message == "task `work`: 0 of 3 succeeded (2 failed), and at least 2 had to"
    assert ended.tasks.cancelled == 1


async def closed_in_time(cluster: Any, job_id: str, ended: Any) -> None:
    """Check that the step was closed, and joined with what had succeeded by then, however much that was."""
    found = await log_of(cluster, job_id)
    at, joined = next((at, one) for at, (_, one) in enumerate(found) if isinstance(one, StepJoined))
    index_of = {stream: one.index for stream, one in found if isinstance(one, events.TaskCreated)}
    good = sorted(index_of[stream] for stream, one in found[:at] if isinstance(one, events.TaskSucceeded))
    assert (list(joined.order), joined.closed, joined.partial) == (good, True, True)
    assert {1, 3} <= set(joined.missing) == {0, 1, 2, 3} - set(good)
    reasons = [one.reason for _, one in found if isinstance(one, TaskCancelled)]
    assert reasons == ["partial"] * len(joined.missing)
    assert ended.state == "succeeded", ended.error_message
    assert msgspec.json.decode(ended.output_json) == {
        "sum": sum([1, 0, 2, 0][one] for one in good),
        "partial": True,
        "of": 4,
    }


async def test_before_the_deadline_the_integrator_gets_what_there_is(cluster, control):
    await cluster.executor("one", AGENTS)
    # Closed after a second: nothing but the time ends two of the tasks.
    document = job(work(**integrator(reserve="59s")))
    job_id = await control.submit(document, input_json=b"[1, -1, 2, -1]")
    await closed_in_time(cluster, job_id, await control.finish(job_id))


async def test_a_new_leader_closes_a_step_of_which_it_reads_in_the_log(cluster, control):
    await cluster.executor("one", AGENTS)
    document = job(work(**integrator(reserve="57s")))
    job_id = await control.submit(document, input_json=b"[1, -1, 2, -1]")
    await control.shut_down()
    now_us = SystemClock().now_us()
    async with await AsyncConnection.connect(cluster.database.role_dsn("scheduler")) as conn:
        known, _ = await recover(PostgresOpenJobs(conn), cluster.reader, Specs(), now_us)
    again, _ = await replay(cluster.reader, Specs(), now_us)
    assert snapshot(known.jobs[job_id]) == snapshot(again.jobs[job_id])
    await control.start()
    await closed_in_time(cluster, job_id, await control.finish(job_id))
