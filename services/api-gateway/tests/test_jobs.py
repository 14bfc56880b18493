import asyncio
import json

import pytest
from hive_common.contracts.limits import INLINE_BYTES_MAX, JOB_BYTES_MAX
from hive_common.contracts.values import digest_of
from hive_common.kernel.ids import new_id
from hive_proto.jobs.v1 import jobs_pb2

DOCUMENT = b'{"apiVersion": "hive/v1", "kind": "Job", "name": "squares", "tasks": [{"id": "a"}]}'


async def submit(http, body=DOCUMENT, **headers):
    response = await http.post("/v1/jobs", data=body, headers={"Content-Type": "application/json", **headers})
    return response, await response.json(content_type=None)


async def test_submit_answers_201_with_location_and_names_the_caller(world, http):
    response, body = await submit(http)
    assert response.status == 201
    assert response.headers["Location"] == f"/v1/jobs/{body['job_id']}"
    assert body["existed"] is False and body["position"] > 0
    sent = world.jobs.requests[-1]
    assert (sent.caller, sent.pin, sent.counts_only) == (world.caller, "any", False)
    assert world.keys["admin"] not in str(world.jobs.metadata)


async def test_submits_that_come_together_go_in_one_call_and_are_refused_one_by_one(world, http):
    world.intake.open.clear()
    names = [f"job-{number}" for number in range(20)]
    bodies = [DOCUMENT.replace(b"squares", name.encode()) for name in names]
    bodies[7] = b'{"name": "no tasks"}'
    answers = []
    for number, body in enumerate(bodies):
        answers.append(asyncio.create_task(submit(http, body)))
        # Two calls are under way before the others come.
        while number < 2 and len(world.intake.calls) <= number:
            await asyncio.sleep(0.005)
    while world.gateway.intake.waiting < 18:
        await asyncio.sleep(0.005)
    world.intake.open.set()
    results = await asyncio.gather(*answers)
    assert world.intake.calls == [1, 1, 18]
    assert [response.status for response, _ in results] == [201] * 7 + [400] + [201] * 12
    assert results[7][1]["path"] == "tasks"
    for number, (_, body) in enumerate(results):
        if number != 7:
            assert world.jobs.jobs[body["job_id"]].name == names[number]


async def test_a_submit_whose_client_left_before_it_was_sent_is_not_sent(world, http):
    world.intake.open.clear()
    first = []
    for number in range(2):
        first.append(asyncio.create_task(submit(http)))
        while len(world.intake.calls) <= number:
            await asyncio.sleep(0.005)
    left = asyncio.create_task(submit(http, DOCUMENT.replace(b"squares", b"unwanted")))
    while world.gateway.intake.waiting < 1:
        await asyncio.sleep(0.005)
    left.cancel()
    await asyncio.wait({left})
    while world.gateway.intake.waiting:
        await asyncio.sleep(0.005)
    world.intake.open.set()
    await asyncio.gather(*first)
    assert (await submit(http))[0].status == 201
    assert "unwanted" not in {job.name for job in world.jobs.jobs.values()}


async def test_a_scheduler_that_is_away_fails_every_submit_of_a_call(world, http):
    await world.stop_peer("scheduler")
    results = await asyncio.gather(*(submit(http) for _ in range(10)))
    assert {(response.status, body["code"]) for response, body in results} == {(503, "unavailable")}


async def test_the_same_idempotency_key_gives_the_same_job_and_another_body_under_it_409(http):
    first, one = await submit(http, **{"Idempotency-Key": "k1"})
    second, two = await submit(http, **{"Idempotency-Key": "k1"})
    assert (first.status, second.status) == (201, 200)
    assert one["job_id"] == two["job_id"] and two["existed"] is True
    third, problem = await submit(http, DOCUMENT.replace(b"squares", b"cubes"), **{"Idempotency-Key": "k1"})
    assert third.status == 409 and problem["code"] == "conflict"


async def test_the_input_reaches_the_scheduler_byte_for_byte(world, http):
    given = b'{ "n" : 1.0000000000000000001, "big": 123456789012345678901234567890 }'
    await submit(http, DOCUMENT[:-1] + b', "input": ' + given + b"}")
    sent = world.jobs.requests[-1]
    assert sent.input_json == given
    assert json.loads(sent.document_json) == json.loads(DOCUMENT)


async def test_a_large_input_becomes_a_blob_and_can_be_named_again_by_digest(world, http):
    given = json.dumps(["x" * 100] * (INLINE_BYTES_MAX // 100)).encode()
    await submit(http, DOCUMENT[:-1] + b', "input": ' + given + b"}")
    sent = world.jobs.requests[-1]
    assert sent.input_json == b"" and sent.input_digest == digest_of(given)
    assert await (await http.get(f"/v1/blobs/{sent.input_digest}")).read() == given
    response, _ = await submit(http, DOCUMENT[:-1] + b', "input_digest": "' + digest_of(given).encode() + b'"}')
    assert response.status == 201 and world.jobs.requests[-1].input_digest == digest_of(given)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"name": [1,2,}', "byte 14"),
        (b'{"name": "x"', "byte 12"),
        (b"", "byte 0"),
        (b"[1]", "Expected `object`, got `array`"),
        (b'{"name": "\xff"}', "not UTF-8 at byte 10"),
        (b'{"name": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "nested too deeply"),
        (DOCUMENT[:-1] + b', "input_digest": "x"}', "64 hex digits"),
        (DOCUMENT[:-1] + b', "input_digest": 4}', "Expected `str`"),
        (DOCUMENT[:-1] + b', "input": 1, "input_digest": "sha256:' + b"0" * 64 + b'"}', "not both"),
        (DOCUMENT[:-1] + b', "input_digest": "sha256:' + b"0" * 64 + b'"}', "there is no blob"),
    ],
)
async def test_a_body_that_cannot_be_a_job_is_refused_with_its_place(world, http, body, says):
    response, problem = await submit(http, body)
    assert response.status == 400 and problem["code"] == "invalid_argument"
    assert says in problem["detail"]
    assert world.jobs.requests == []


async def test_what_the_scheduler_refuses_keeps_its_message_and_fields(http):
    response, problem = await submit(http, b'{"name": "x"}')
    assert response.status == 400
    assert response.headers["Content-Type"] == "application/problem+json"
    assert problem["detail"] == "job: tasks: expected at least one task"
    assert problem["path"] == "tasks" and problem["file"] == "job"
    assert (
        problem["status"] == 400 and problem["retryable"] is False and problem["type"].endswith("invalid_argument")
    )


async def test_a_document_over_its_limit_is_413_though_the_same_bytes_as_input_are_taken(world, http):
    padding = json.dumps("x" * JOB_BYTES_MAX).encode()
    response, problem = await submit(http, DOCUMENT[:-1] + b', "description": ' + padding + b"}")
    assert response.status == 413 and problem["limit_bytes"] == JOB_BYTES_MAX
    response, _ = await submit(http, DOCUMENT[:-1] + b', "input": ' + padding + b"}")
    assert response.status == 201


async def test_a_job_is_shown_with_counts_error_and_raw_output(world, http):
    job = world.jobs.add(state="failed", error_code="task_failed", error_message="no", error_task="t")
    job.tasks.total = 3
    body = await (await http.get(f"/v1/jobs/{job.job_id}")).json()
    assert body["tasks"]["total"] == 3 and body["ended_us"] is None
    assert body["error"] == {"code": "task_failed", "message": "no", "task": "t"}
    assert "output" not in body
    job = world.jobs.add(state="succeeded", output_json=b'{"total": 14}')
    body = await (await http.get(f"/v1/jobs/{job.job_id}?min_position=5")).json()
    assert body["output"] == {"total": 14} and body["error"] is None
    assert world.jobs.requests[-1].min_position == 5


async def test_jobs_are_listed_in_pages(world, http):
    ids = sorted((world.jobs.add().job_id for _ in range(3)), reverse=True)
    world.jobs.add(state="failed")
    page = await (await http.get("/v1/jobs?limit=2&state=running")).json()
    assert [job["job_id"] for job in page["jobs"]] == ids[:2] and page["next"] == ids[1]
    page = await (await http.get(f"/v1/jobs?limit=2&state=running&after={page['next']}")).json()
    assert [job["job_id"] for job in page["jobs"]] == ids[2:] and page["next"] is None


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "state=bogus"])
async def test_bad_parameters_are_problems_that_name_them(http, query):
    response = await http.get(f"/v1/jobs?{query}")
    problem = await response.json()
    assert response.status == 400 and problem["code"] == "invalid_argument"
    assert problem["path"] == "query." + query.split("=")[0]


async def test_the_output_comes_byte_for_byte_inline_or_from_its_blob(world, http):
    inline = world.jobs.add(state="succeeded", output_json=b'{ "a": 1.0 }')
    assert await (await http.get(f"/v1/jobs/{inline.job_id}/output")).read() == b'{ "a": 1.0 }'
    large = b'["' + b"x" * 2_000_000 + b'"]'
    await http.put(f"/v1/blobs/{digest_of(large)}", data=large)
    job = world.jobs.add(state="succeeded", output_digest=digest_of(large))
    response = await http.get(f"/v1/jobs/{job.job_id}/output")
    assert await response.read() == large and response.headers["Content-Type"] == "application/json"


async def test_a_job_without_an_output_says_its_state(world, http):
    job = world.jobs.add()
    response = await http.get(f"/v1/jobs/{job.job_id}/output")
    assert response.status == 409 and (await response.json())["state"] == "running"


async def test_cancel_is_accepted_with_reason_and_caller(world, http):
    job = world.jobs.add()
    response = await http.delete(f"/v1/jobs/{job.job_id}?reason=enough")
    assert response.status == 202 and (await response.json())["state"] == "cancelling"
    assert world.jobs.requests[-1].reason == "enough" and world.jobs.requests[-1].caller == world.caller


async def test_tasks_logs_and_explanation_of_a_job(world, http):
    job = world.jobs.add()
    tasks = (await (await http.get(f"/v1/jobs/{job.job_id}/tasks")).json())["tasks"]
    assert [task["index"] for task in tasks] == [0, 1, 2, None]
    assert tasks[0]["output"] == 4 and tasks[3]["error"]["code"] == "timeout"
    logs = (await (await http.get(f"/v1/jobs/{job.job_id}/logs")).json())["logs"]
    assert logs[0]["lines"] == [{"text": "hello"}]
    explanation = await http.get(f"/v1/tasks/{job.job_id}/explain")
    assert await explanation.read() == b'{"task": "x", "decisions": []}'


async def test_a_decision_is_passed_on_as_it_is_and_one_that_is_not_there_is_a_409(world, http):
    job = world.jobs.add()
    path = f"/v1/tasks/{job.job_id}/decision"
    refused = await http.get(path)
    assert refused.status == 409
    assert "was not judged" in (await refused.json(content_type=None))["detail"]
    world.jobs.decision = b'{ "winner": 2 }'
    assert await (await http.get(path)).read() == world.jobs.decision
    assert (await http.get(f"/v1/tasks/{new_id()}/decision")).status == 404


async def test_judges_and_what_several_attempts_gave_are_shown_with_tasks(world, http):
    job = world.jobs.add()
    judged, critic = new_id(), new_id()
    world.jobs.tasks = [
        jobs_pb2.Task(task_id=judged, index=-1, state="succeeded", replicas=3, decided=True, output_json=b"[1, 2]"),
        jobs_pb2.Task(task_id=critic, index=-1, judging="critic", judged=judged, judged_attempts=[1, 3]),
        jobs_pb2.Task(task_id=new_id(), index=-1, judging="integrator", waits_for="waits for an executor"),
        jobs_pb2.Task(
            task_id=new_id(),
            index=-1,
            kept=[
                jobs_pb2.KeptOutput(attempt=1, output_json=b"1", size_bytes=1),
                jobs_pb2.KeptOutput(attempt=2, output_digest="sha256:0", size_bytes=9),
            ],
        ),
    ]
    tasks = (await (await http.get(f"/v1/jobs/{job.job_id}/tasks")).json())["tasks"]
    assert [(task["replicas"], task["decided"], task["judging"]) for task in tasks] == [
        (3, True, None),
        (0, False, {"kind": "critic", "task": judged, "attempts": [1, 3]}),
        (0, False, {"kind": "integrator", "task": None, "attempts": []}),
        (0, False, None),
    ]
    assert [task["waits_for"] for task in tasks] == [None, None, "waits for an executor", None]
    assert tasks[0]["output"] == [1, 2]
    assert tasks[3]["kept"] == [
        {"attempt": 1, "size_bytes": 1, "output": 1},
        {"attempt": 2, "size_bytes": 9, "output_digest": "sha256:0"},
    ]


async def test_a_page_of_tasks_that_ended_early_is_followed_by_another(world, http):
    job = world.jobs.add()
    path = f"/v1/jobs/{job.job_id}/tasks"
    whole = await (await http.get(path)).json()
    assert whole["next"] is None and len(whole["tasks"]) == 4
    world.jobs.more = True
    cut = await (await http.get(path)).json()
    assert cut["next"] == cut["tasks"][-1]["task_id"]


async def test_history_comes_as_pages_or_as_lines(world, http):
    job = world.jobs.add()
    for number in range(5):
        await world.jobs.record(job.job_id, "TaskReady", b'{\n "n": %d}' % number)
    page = await (await http.get(f"/v1/jobs/{job.job_id}/events?limit=2")).json()
    assert [event["data"]["n"] for event in page["events"]] == [0, 1]
    page = await (await http.get(f"/v1/jobs/{job.job_id}/events?from_position={page['next']}")).json()
    assert [event["data"]["n"] for event in page["events"]] == [2, 3, 4] and page["next"] is None
    response = await http.get(f"/v1/jobs/{job.job_id}/events", headers={"Accept": "application/x-ndjson"})
    events = [json.loads(line) for line in (await response.read()).splitlines()]
    assert [event["data"]["n"] for event in events] == [0, 1, 2, 3, 4]
    assert set(events[0]) >= {"position", "stream", "type", "ts_us", "data"}


@pytest.mark.parametrize("accept", ["application/json", "application/x-ndjson"])
async def test_an_unknown_job_is_404_before_the_first_byte(http, accept):
    for suffix in ("", "/output", "/tasks", "/events", "/logs", "/stream", "/logs/stream"):
        response = await http.get(f"/v1/jobs/{new_id()}{suffix}", headers={"Accept": accept})
        assert response.status == 404, suffix
        assert (await response.json(content_type="application/problem+json"))["code"] == "not_found"


async def test_an_id_that_is_none_is_refused_here(world, http):
    response = await http.get("/v1/jobs/not-an-id")
    problem = await response.json()
    assert response.status == 400 and problem["path"] == "path.job_id"
    assert "expected the id of a job" in problem["detail"]
    assert world.jobs.requests == []


async def test_a_submit_is_counted_under_the_path_that_describes_it(world, http):
    await submit(http)
    refused, problem = await submit(http, **{"Idempotency-Key": "k" * 256})
    assert refused.status == 400 and problem["path"] == "header.idempotency-key"
    text = await (await http.get("/metrics")).text()
    assert 'hive_requests_total{code="201",method="POST /v1/jobs"}' in text
    assert 'hive_requests_total{code="400",method="POST /v1/jobs"}' in text
