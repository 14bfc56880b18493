"""Forks, joins, retries, failures, cancels and bad documents, with a real log and a real bus."""

import asyncio
from collections import Counter

import msgspec
import pytest
from hive_common.artifacts.manifest import AgentManifest
from hive_common.contracts import values
from hive_common.kernel.errors import Conflict, ErrorBody, InvalidArgument, NotFound, PermissionDenied
from hive_common.rpc.client import bearer, call
from hive_common.rpc.rules import KeyRules, metadata_of
from hive_proto.jobs.v1 import jobs_pb2, jobs_pb2_grpc

from .conftest import KEY, Failure

SQUARES = {
    "apiVersion": "hive/v1",
    "kind": "Job",
    "name": "squares",
    "input": {"numbers": [1, 2, 3]},
    "tasks": [
        {
            "id": "square",
            "agent": "square@1.0.0",
            "fork": "${input.numbers}",
            "input": {"n": "${item}", "at": "${index}"},
        },
        {
            "id": "total",
            "needs": ["square"],
            "agent": "total@1.0.0",
            "input": {"squares": "${tasks.square.output}"},
        },
    ],
    "output": "${tasks.total.output}",
}


def square(assignment, given):
    return given["n"] ** 2


def total(assignment, given):
    return {"sum": sum(given["squares"]), "squares": given["squares"]}


AGENTS = {"square": square, "total": total}


def types_of(events):
    return Counter(event.type for event in events)


async def test_a_fork_is_joined_in_the_order_of_its_list(cluster, control):
    async def slow_first(assignment, given):
        await asyncio.sleep(0.2 if given["at"] == 0 else 0)
        return given["n"] ** 2

    await cluster.executor("one", {"square": slow_first, "total": total})
    job = await control.finish(await control.submit(SQUARES))
    assert msgspec.json.decode(job.output_json) == {"sum": 14, "squares": [1, 4, 9]}
    assert [(step.step, step.tasks.succeeded) for step in job.steps] == [("square", 3), ("total", 1)]


async def test_a_fork_over_an_earlier_output_makes_its_tasks_when_the_list_is_there(cluster, control):
    document = {
        **SQUARES,
        "tasks": [
            {"id": "plan", "agent": "square@1.0.0", "input": {"n": "${length(input.numbers)}"}},
            {
                "id": "work",
                "needs": ["plan"],
                "agent": "total@1.0.0",
                "fork": "${tasks.plan.output}",
                "input": {"squares": ["${item}"]},
            },
        ],
        "output": "${tasks.work.output[*].sum}",
    }
    await cluster.executor("one", {"square": lambda a, given: list(range(given["n"])), "total": total})
    job = await control.finish(await control.submit(document))
    assert (job.state, msgspec.json.decode(job.output_json)) == ("succeeded", [0, 1, 2])


async def test_an_empty_fork_gives_an_empty_list(cluster, control):
    await cluster.executor("one", AGENTS)
    job_id = await control.submit(SQUARES, input_json=b'{"numbers": []}')
    job = await control.finish(job_id)
    assert msgspec.json.decode(job.output_json) == {"sum": 0, "squares": []}


async def test_a_fork_of_thousands_is_made_in_chunks_and_all_of_it_ends(cluster, control):
    document = {**SQUARES, "limits": {"fan_out": 3000}, "output": "${tasks.total.output.sum}"}
    numbers = list(range(2000))
    for name in ("one", "two"):
        await cluster.executor(name, AGENTS, slots=64)
    job_id = await control.submit(document, input_json=msgspec.json.encode({"numbers": numbers}))
    watching = asyncio.create_task(control.watch_batches(job_id))
    job = await control.finish(job_id)
    assert msgspec.json.decode(job.output_json) == sum(n * n for n in numbers)
    assert (job.tasks.total, job.tasks.succeeded, job.attempts) == (2001, 2001, 2001)
    one_by_one = await control.watch(job_id)
    seen = types_of(one_by_one)
    assert (seen["TaskCreated"], seen["TaskSucceeded"], seen["JobSucceeded"]) == (2001, 2001, 1)
    batches = await watching
    assert [event for batch in batches for event in batch] == one_by_one
    assert len(batches) < len(one_by_one) / 8
    versions = await cluster.reader.versions([job_id])
    assert versions == {job_id: 2}


async def test_a_failed_attempt_is_retried_and_the_pause_doubles(cluster, control, one_step, fail):
    calls = []

    def flaky(assignment, given):
        calls.append(assignment.attempt)
        if len(calls) < 3:
            raise fail("agent_error", "not yet")
        return "done"

    one_step["tasks"][0]["retry"] = {"max_attempts": 3, "backoff": "100ms"}
    await cluster.executor("one", {"square": flaky})
    job_id = await control.submit(one_step)
    job = await control.finish(job_id)
    assert (job.state, job.attempts, calls) == ("succeeded", 3, [1, 2, 3])
    pauses = [
        msgspec.json.decode(event.data_json)["not_before_us"] - event.ts_us
        for event in await control.watch(job_id)
        if event.type == "TaskRetryScheduled"
    ]
    assert [round(pause / 100_000) for pause in pauses] == [1, 2]


async def test_a_task_without_retries_left_fails_the_job_and_cancels_the_rest(cluster, control, fail):
    async def square_or_fail(assignment, given):
        if given["n"] == 2:
            raise fail("trap", "out of bounds")
        await asyncio.sleep(30)

    fake = await cluster.executor("one", {"square": square_or_fail, "total": total})
    job_id = await control.submit(SQUARES)
    job = await control.finish(job_id)
    assert (job.state, job.error_code, job.error_message) == ("failed", "trap", "out of bounds")
    assert (job.tasks.failed, job.tasks.cancelled) == (1, 3)
    rows = await control.rpc("Tasks", jobs_pb2.TasksRequest(job_id=job_id, state="failed"))
    assert [row.task_id for row in rows.tasks] == [job.error_task]
    while fake.held:
        await asyncio.sleep(0.02)


async def test_a_cancelled_job_ends_its_attempts_and_stays_cancelled(cluster, control, one_step):
    running = asyncio.Event()

    async def endless(assignment, given):
        running.set()
        await asyncio.sleep(60)

    fake = await cluster.executor("one", {"square": endless})
    job_id = await control.submit(one_step)
    await running.wait()
    answer = await control.rpc("Cancel", jobs_pb2.CancelRequest(job_id=job_id, reason="enough", caller="me"))
    assert answer.state in ("cancelling", "cancelled")
    job = await control.finish(job_id)
    assert (job.state, job.tasks.cancelled) == ("cancelled", 1)
    while fake.held:
        await asyncio.sleep(0.02)
    again = await control.rpc("Cancel", jobs_pb2.CancelRequest(job_id=job_id))
    assert again.state == "cancelled"
    assert types_of(await control.watch(job_id))["JobCancelRequested"] == 1


async def test_a_job_that_nobody_can_run_ends_at_its_deadline(cluster, control, one_step):
    one_step["limits"] = {"deadline": "300ms"}
    job = await control.finish(await control.submit(one_step))
    assert (job.state, job.error_code, job.tasks.cancelled) == ("failed", "deadline_exceeded", 1)


async def test_an_output_that_breaks_the_agents_schema_is_a_failed_attempt(cluster, control, one_step):
    schema = {"type": "object", "required": ["n"], "properties": {"n": {"type": "integer"}}}
    await cluster.publish(
        AgentManifest(name="strict", version="1.0.0", runtime="python", entry="agent.py", output=schema)
    )
    one_step["tasks"][0]["agent"] = "strict@1.0.0"
    await cluster.executor("one", {"strict": lambda a, given: {"n": "nine"}})
    job = await control.finish(await control.submit(one_step))
    assert (job.state, job.error_code) == ("failed", "invalid_output")
    assert "n: 'nine' is not of type 'integer'" in job.error_message


async def test_an_input_made_of_outputs_that_breaks_the_schema_fails_its_task(cluster, control):
    schema = {"type": "object", "properties": {"squares": {"type": "array", "maxItems": 2}}}
    await cluster.publish(
        AgentManifest(name="few", version="1.0.0", runtime="python", entry="agent.py", input=schema)
    )
    document = {**SQUARES, "tasks": [SQUARES["tasks"][0], {**SQUARES["tasks"][1], "agent": "few@1.0.0"}]}
    await cluster.executor("one", AGENTS)
    job = await control.finish(await control.submit(document))
    assert (job.state, job.error_code, job.tasks.failed) == ("failed", "invalid_input", 1)
    assert job.error_message.startswith("tasks[1].input: does not fit the input schema of few@1.0.0")


async def test_a_dynamic_fork_over_what_is_no_list_fails_the_job(cluster, control):
    document = {**SQUARES, "tasks": [{"id": "plan", "agent": "square@1.0.0"}, {
        "id": "work", "needs": ["plan"], "agent": "total@1.0.0", "fork": "${tasks.plan.output}",
    }], "output": None}  # fmt: skip
    await cluster.executor("one", {"square": lambda a, given: {"no": "list"}})
    job = await control.finish(await control.submit(document))
    assert (job.state, job.error_code) == ("failed", "invalid_fork")
    assert job.error_message == "tasks[1].fork: expected a list, got an object"


@pytest.mark.parametrize(
    ("change", "path"),
    [
        ({"tasks": [{"id": "square", "agent": "sqare@1.0.0"}]}, "tasks[0].agent"),
        ({"tasks": [{"id": "square", "agent": "square@1.0.0", "needs": ["no"]}]}, "tasks[0].needs"),
        ({"tasks": [{"id": "a", "agent": "square@1.0.0", "fork": "${input.word}"}]}, "tasks[0].fork"),
        ({"tasks": [{"id": "a", "agent": "square@1.0.0", "input": "${input.absent}"}]}, "tasks[0].input"),
        ({"tasks": [{"id": "a", "agent": "square@1.0.0", "input": "${input."}]}, "tasks[0].input"),
        ({"limits": {"fan_out": 2}}, "limits.fan_out"),
    ],
)
async def test_a_bad_document_is_refused_before_anything_is_committed(cluster, control, change, path):
    head = await cluster.reader.head()
    document = {**SQUARES, "input": {"numbers": [1, 2, 3], "word": "text"}, "output": None, **change}
    with pytest.raises(InvalidArgument) as refused:
        await control.submit(document)
    assert refused.value.fields["path"] == path
    assert refused.value.message.startswith(path)
    assert await cluster.reader.head() == head


async def test_a_static_input_that_breaks_the_schema_is_refused(cluster, control):
    schema = {"type": "object", "properties": {"n": {"maximum": 2}}}
    await cluster.publish(
        AgentManifest(name="small", version="1.0.0", runtime="python", entry="agent.py", input=schema)
    )
    document = {**SQUARES, "tasks": [{**SQUARES["tasks"][0], "agent": "small@1.0.0"}], "output": None}
    with pytest.raises(InvalidArgument, match=r"tasks\[0\]\.input \(element 2 of the fork\).*3 is greater than"):
        await control.submit(document)


async def test_a_job_whose_models_may_be_nowhere_is_refused(cluster, control, one_step):
    asked = {"model": {"names": ["small"], "max_tokens": 9, "pin": "region:eu"}}
    await cluster.publish(
        AgentManifest(name="asks", version="1.0.0", runtime="python", entry="agent.py", permissions=asked)
    )
    seen = []

    def run(assignment, given):
        seen.append(assignment.pin)
        return {}

    await cluster.executor("one", {"total": run})
    task = {**one_step["tasks"][0], "agent": "asks@1.0.0", "input": {}}
    document = {**one_step, "tasks": [task], "models": {"pin": "own-devices"}, "output": None}
    with pytest.raises(InvalidArgument, match=r"\Amodels\.pin: `own-devices` and `region:eu`.*asks@1\.0\.0"):
        await control.submit(document)
    # What has no permission has nothing to pin.
    total = {**task, "agent": "total@1.0.0"}
    done = await control.finish(await control.submit({**document, "tasks": [total]}))
    assert (done.state, seen) == ("succeeded", ["own-devices"])


async def test_the_rules_of_the_key_come_with_the_assignment_and_the_document_only_narrows_them(
    cluster, control, one_step
):
    seen = []

    def run(assignment, given):
        seen.append((assignment.pin, assignment.counts_only))
        return {}

    await cluster.executor("one", {"total": run})
    task = {**one_step["tasks"][0], "agent": "total@1.0.0", "input": {}}
    document = {**one_step, "tasks": [task], "output": None}
    # By the gateway for many at once, and beside a call that it passes on as it is.
    await control.finish(await control.submit(document, pin="pool", counts_only=True))
    beside = metadata_of(KeyRules("own-devices", counts_only=True))
    for given in ({}, {"pin": "own-devices"}):
        await control.finish(
            await control.submit({**document, "models": {"pin": "pool"}}, metadata=beside, **given)
        )
    await control.finish(await control.submit(document))
    assert seen == [("pool", True), ("own-devices", True), ("own-devices", True), ("any", False)]
    with pytest.raises(PermissionDenied, match="`own-devices`"):
        await control.submit(document, metadata=beside, pin="any")
    with pytest.raises(
        PermissionDenied, match=r"\Amodels\.pin: .*the key that submits the job pins to `own-devices`"
    ):
        await control.submit({**document, "models": {"pin": "region:eu"}}, metadata=beside)


async def test_an_attempt_that_was_denied_a_permission_is_not_retried(cluster, control, one_step):
    attempts = []

    def run(assignment, given):
        attempts.append(assignment.attempt)
        raise Failure("permission_denied", "`model`")

    await cluster.executor("one", {"total": run})
    task = {
        **one_step["tasks"][0],
        "agent": "total@1.0.0",
        "input": {},
        "retry": {"max_attempts": 3, "backoff": "1ms"},
    }
    done = await control.finish(await control.submit({**one_step, "tasks": [task], "output": None}))
    assert (done.state, attempts) == ("failed", [1])


async def test_an_idempotency_key_gives_the_same_job_and_refuses_another(cluster, control, one_step):
    first = await control.submit_full(one_step, idempotency_key="k")
    again = await control.submit_full(one_step, idempotency_key="k")
    assert (again.job_id, again.position, again.existed) == (first.job_id, first.position, True)
    together = await asyncio.gather(*(control.submit_full(one_step, idempotency_key="t") for _ in range(5)))
    assert len({answer.job_id for answer in together}) == 1
    assert sum(not answer.existed for answer in together) == 1
    with pytest.raises(Conflict):
        await control.submit_full(one_step, idempotency_key="k", input_json=b'{"n": 4}')


async def test_an_agent_published_a_moment_ago_is_known(cluster, control, one_step):
    await cluster.publish(AgentManifest(name="fresh", version="1.0.0", runtime="python", entry="agent.py"))
    one_step["tasks"][0]["agent"] = "fresh@1.0.0"
    assert await control.submit(one_step)


async def test_large_values_travel_by_digest_and_can_be_looked_into(cluster, control):
    text = "x" * 400_000
    document = {**SQUARES, "tasks": [
        {"id": "make", "agent": "square@1.0.0", "input": {"n": 1}},
        {"id": "whole", "needs": ["make"], "agent": "total@1.0.0", "input": "${tasks.make.output}"},
        {
            "id": "part", "needs": ["make"], "agent": "total@1.0.0",
            "input": {"w": "${length(tasks.make.output.text)}"},
        },
    ], "output": {"copy": "${tasks.make.output.text}", "width": "${tasks.part.output}"}}  # fmt: skip
    seen = {}

    async def make(assignment, given):
        raw = values.encode_json({"text": text})
        await store.put(raw)
        return msgspec.structs.replace(ok(assignment, None), output=values.by_digest(raw))

    def take(assignment, given):
        seen[assignment.step] = given if given else assignment.input.digest
        return given["w"] if given else None

    from hive_common.artifacts.store import FolderStore
    from hive_common.contracts.messages import AttemptReport

    store = FolderStore(cluster.folder / "artifacts")

    def ok(assignment, output):
        return AttemptReport(assignment.task, assignment.attempt, fake.session, "succeeded")

    fake = await cluster.executor("one", {"square": make, "total": take}, start=False)
    cluster.run(fake)
    job = await control.finish(await control.submit(document))
    assert job.state == "succeeded", job.error_message
    assert seen["whole"] == values.digest_of(values.encode_json({"text": text}))
    assert seen["part"] == {"w": 400_000}
    assert msgspec.json.decode(await store.get(job.output_digest)) == {"copy": text, "width": 400_000}


async def test_tasks_are_paged_and_their_logs_are_found(cluster, control):
    from hive_common.contracts.messages import AttemptReport

    def logged(assignment, given):
        return AttemptReport(
            assignment.task, assignment.attempt, fake.session, "succeeded",
            output=values.inline(b"1"), log=values.inline(b'[{"text": "line"}]'),
        )  # fmt: skip

    fake = await cluster.executor("one", {"square": logged, "total": lambda a, given: 2}, start=False)
    cluster.run(fake)
    job_id = await control.submit(SQUARES)
    await control.finish(job_id)
    first = await control.rpc("Tasks", jobs_pb2.TasksRequest(job_id=job_id, limit=3))
    rest = await control.rpc("Tasks", jobs_pb2.TasksRequest(job_id=job_id, after=first.tasks[-1].task_id))
    assert [(task.step, task.index) for task in (*first.tasks, *rest.tasks)] == [
        ("square", 0), ("square", 1), ("square", 2), ("total", -1),
    ]  # fmt: skip
    assert {task.executor for task in first.tasks} == {fake.id}
    logs = await control.rpc("Logs", jobs_pb2.LogsRequest(job_id=job_id))
    assert [(log.step, log.index, log.attempt) for log in logs.logs] == [("square", n, 1) for n in range(3)]
    assert {log.log_json for log in logs.logs} == {b'[{"text": "line"}]'}


async def test_explain_names_why_each_device_does_not_do(cluster, control, one_step):
    await cluster.register("wasm", runtimes=("component",))
    await cluster.register("asleep")
    job_id = await control.submit(one_step)
    tasks = []
    while not tasks:
        tasks = (await control.rpc("Tasks", jobs_pb2.TasksRequest(job_id=job_id))).tasks
    answer = await control.rpc("Explain", jobs_pb2.ExplainRequest(task_id=tasks[0].task_id))
    explained = msgspec.json.decode(answer.explanation_json)
    assert explained["state"] == "ready"
    assert {one["name"]: one["reason"] for one in explained["candidates"]} == {
        "wasm": "runtime_missing",
        "asleep": "offline",
    }


async def test_what_is_not_there_is_not_found(cluster, control):
    for method, request in (
        ("Get", jobs_pb2.GetRequest(job_id="no")),
        ("Cancel", jobs_pb2.CancelRequest(job_id="no")),
        ("Tasks", jobs_pb2.TasksRequest(job_id="no")),
        ("Logs", jobs_pb2.LogsRequest(job_id="no")),
        ("Explain", jobs_pb2.ExplainRequest(task_id="no")),
    ):
        with pytest.raises(NotFound):
            await control.rpc(method, request)


async def test_jobs_are_listed_newest_first_and_by_state(cluster, control, one_step):
    ids = [await control.submit(one_step) for _ in range(3)]
    await control.rpc("Cancel", jobs_pb2.CancelRequest(job_id=ids[0]))
    job = await control.finish(ids[0])
    listed = await control.rpc("List", jobs_pb2.ListRequest(limit=2))
    rest = await control.rpc("List", jobs_pb2.ListRequest(after=listed.jobs[-1].job_id))
    assert [one.job_id for one in (*listed.jobs, *rest.jobs)] == ids[::-1]
    running = await control.rpc("List", jobs_pb2.ListRequest(state="running"))
    assert [one.job_id for one in running.jobs] == ids[:0:-1]
    assert job.state == "cancelled"


async def test_jobs_of_one_call_are_taken_or_refused_each_on_its_own(cluster, control, one_step):
    await cluster.executor("one", {"square": lambda assignment, given: given["n"] ** 2})
    intake = jobs_pb2_grpc.IntakeStub(control.channel)
    documents = [{**one_step, "input": {"n": n}} for n in range(4)]
    documents[2] = {**one_step, "tasks": []}
    request = jobs_pb2.SubmitManyRequest(
        submits=[
            jobs_pb2.SubmitRequest(document_json=msgspec.json.encode(document), caller=f"caller-{n}")
            for n, document in enumerate(documents)
        ]
    )
    results = (await call(intake.SubmitMany(request, metadata=bearer(KEY), timeout=20))).results
    refused = msgspec.json.decode(results[2].error_json, type=ErrorBody)
    assert (refused.code, refused.fields["path"]) == ("invalid_argument", "tasks")
    for n in (0, 1, 3):
        assert not results[n].error_json
        job = await control.finish(results[n].taken.job_id)
        assert msgspec.json.decode(job.output_json) == n * n
        (submitted, *_) = await cluster.log(results[n].taken.job_id)
        assert (submitted.position, submitted.actor) == (results[n].taken.position, f"caller-{n}")


async def test_a_call_of_too_many_jobs_is_refused(control, one_step):
    submit = jobs_pb2.SubmitRequest(document_json=msgspec.json.encode(one_step))
    request = jobs_pb2.SubmitManyRequest(submits=[submit] * 257)
    with pytest.raises(InvalidArgument, match="256"):
        await call(jobs_pb2_grpc.IntakeStub(control.channel).SubmitMany(request, metadata=bearer(KEY), timeout=20))
