import asyncio
import contextlib
import json

import msgspec
import pytest
from hive_common.bus.nats import connect
from hive_common.contracts.events import (
    Judging,
    StepJoined,
    TaskAssigned,
    TaskCreated,
    TaskDecided,
    TaskExtended,
    encode,
)
from hive_common.contracts.judgement import Decision, Rule
from hive_common.contracts.messages import LogBatch, LogLine, log_subject
from hive_common.kernel.ids import new_id
from hive_common.testing.identities import EVERYTHING


async def test_a_stream_carries_history_and_news_and_ends_in_done(world, http, read_sse, eventually):
    job = world.jobs.add()
    first = await world.jobs.record(job.job_id, "JobSubmitted", b'{\n"name": "x"}')
    async with http.get(f"/v1/jobs/{job.job_id}/stream") as response:
        assert response.headers["Content-Type"].startswith("text/event-stream")
        events = await read_sse(response, 1)
        assert events[0]["id"] == str(first) and events[0]["event"] == "JobSubmitted"
        data = json.loads(events[0]["data"])
        assert data["position"] == first and data["stream"] == job.job_id and data["data"] == {"name": "x"}
        await world.jobs.record(job.job_id, "TaskCreated")
        await world.jobs.record(job.job_id, "JobSucceeded")
        events = await read_sse(response)
    assert [event.get("event") for event in events] == ["TaskCreated", "JobSucceeded", None]
    assert events[-1]["data"] == "[DONE]"
    await eventually(lambda: world.jobs.watching == 0)


async def test_a_stream_carries_what_was_judged_with_its_content(world, http, read_sse):
    job = world.jobs.add()
    decision = Decision(v=1, task="t", rule=Rule(k=2, of=3), outcome="decided", winner=2, votes=(1, 2))
    told = [
        TaskCreated(job.job_id, "solve", "critic@1.0.0", judging=Judging("critic", "t", (1, 2))),
        TaskExtended(2, "extend"),
        TaskDecided(decision, trust=4),
        StepJoined("solve", "vote", order=(0,), votes=(0, 2), tied=(0, 1), missing=(3,), partial=True),
    ]
    for event in told:
        await world.jobs.record(job.job_id, type(event).__name__, encode(event))
    await world.jobs.record(job.job_id, "JobSucceeded")
    async with http.get(f"/v1/jobs/{job.job_id}/stream") as response:
        events = await read_sse(response)
    for event, sent in zip(told, events, strict=False):
        assert sent["event"] == type(event).__name__
        assert json.loads(sent["data"])["data"] == json.loads(encode(event))


async def test_a_stream_ends_with_the_end_of_its_job_without_a_look_at_a_view(world, http, read_sse, monkeypatch):
    monkeypatch.setattr("hive_gateway.following._DELAY_S", 3600.0)
    job = world.jobs.add()
    await world.jobs.record(job.job_id, "JobSubmitted")
    async with http.get(f"/v1/jobs/{job.job_id}/stream") as response:
        await read_sse(response, 1)
        world.jobs.views_lag = True
        await world.jobs.record(job.job_id, "JobSucceeded")
        events = await asyncio.wait_for(read_sse(response), 20)
    assert [event.get("event") for event in events] == ["JobSucceeded", None]
    assert world.jobs.gets == 0


async def test_following_from_the_beginning_begins_with_no_look_at_a_view(world, http, read_sse):
    job = world.jobs.add()
    await world.jobs.record(job.job_id, "JobSubmitted")
    async with http.get(f"/v1/jobs/{job.job_id}/stream") as response:
        events = await read_sse(response, 1)
    assert [event.get("event") for event in events] == ["JobSubmitted"]
    assert world.jobs.gets == 0


async def test_a_stream_of_a_job_that_is_not_there_is_a_404(world, http):
    response = await http.get(f"/v1/jobs/{new_id()}/stream")
    assert response.status == 404


async def test_last_event_id_resumes_behind_it(world, http, read_sse):
    job = world.jobs.add()
    positions = [await world.jobs.record(job.job_id, f"T{n}") for n in range(3)]
    await world.jobs.record(job.job_id, "JobSucceeded")
    headers = {"Last-Event-ID": str(positions[1])}
    async with http.get(f"/v1/jobs/{job.job_id}/stream", headers=headers) as response:
        events = await read_sse(response)
    assert [event.get("event") for event in events] == ["T2", "JobSucceeded", None]


@pytest.mark.parametrize("value", ["x", "-1", "9" * 20, "²"])
async def test_a_last_event_id_that_is_no_position_is_refused(world, http, value):
    job = world.jobs.add()
    response = await http.get(f"/v1/jobs/{job.job_id}/stream", headers={"Last-Event-ID": value})
    assert response.status == 400


async def test_heartbeats_are_comments(world, http):
    world.gateway.followers.heartbeat_s = 0.02
    job = world.jobs.add()
    await world.jobs.record(job.job_id, "JobSubmitted")
    async with http.get(f"/v1/jobs/{job.job_id}/stream") as response:
        beats = 0
        async for line in response.content:
            beats += line == b": heartbeat\n"
            if beats == 3:
                break
    assert beats == 3


async def test_a_client_that_goes_away_ends_the_call_behind(world, http, read_sse, eventually):
    job = world.jobs.add()
    await world.jobs.record(job.job_id, "JobSubmitted")
    response = await http.get(f"/v1/jobs/{job.job_id}/stream")
    await read_sse(response, 1)
    assert world.jobs.watching == 1
    response.close()
    await eventually(lambda: world.jobs.watching == 0)


async def test_a_client_that_stops_waiting_for_an_answer_ends_the_call_behind(world, http, eventually):
    world.audit.hold_verify = True
    waiting = asyncio.create_task(http.get("/v1/audit/verify"))
    await asyncio.wait_for(world.audit.verifying.wait(), 20)
    waiting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await waiting
    await asyncio.wait_for(world.audit.cancelled.wait(), 20)


async def test_a_scheduler_that_restarts_breaks_no_stream_and_doubles_no_event(world, http, read_sse):
    job = world.jobs.add()
    for number in range(6):
        await world.jobs.record(job.job_id, f"T{number}")
    world.jobs.break_watches_after = 2
    async with http.get(f"/v1/jobs/{job.job_id}/stream") as response:
        assert [e["event"] for e in await read_sse(response, 4)] == ["T0", "T1", "T2", "T3"]
        port = await world.stop_peer("scheduler")
        world.jobs.break_watches_after = None
        await world.start_peer("scheduler", port)
        await world.jobs.record(job.job_id, "JobSucceeded")
        events = await read_sse(response)
    assert [event.get("event") for event in events] == ["T4", "T5", "JobSucceeded", None]
    assert events[-1]["data"] == "[DONE]"


async def test_a_stream_that_cannot_go_on_ends_in_an_error_and_not_in_done(world, http, read_sse, monkeypatch):
    monkeypatch.setattr("hive_gateway.following.REATTACH_S", 0.0)
    job = world.jobs.add()
    await world.jobs.record(job.job_id, "JobSubmitted")
    async with http.get(f"/v1/jobs/{job.job_id}/stream") as response:
        await read_sse(response, 1)
        await world.stop_peer("scheduler")
        events = await read_sse(response)
    assert [event["event"] for event in events] == ["error"]
    problem = json.loads(events[0]["data"])
    assert problem["code"] == "unavailable" and problem["retryable"] is True


async def test_streams_end_when_the_gateway_stops(world, http, read_sse):
    job = world.jobs.add()
    await world.jobs.record(job.job_id, "JobSubmitted")
    async with http.get(f"/v1/jobs/{job.job_id}/stream") as response:
        await read_sse(response, 1)
        world.gateway.followers.stopping.set()
        rest = await asyncio.wait_for(response.content.read(), 20)
    assert b"stops" in rest and b"[DONE]" not in rest
    assert "gateway" in world.gateway.health.problems()


async def test_more_streams_than_are_held_are_429(world, http, monkeypatch):
    monkeypatch.setattr(world.gateway.followers, "_followers_max", 1)
    job = world.jobs.add()
    await world.jobs.record(job.job_id, "JobSubmitted")
    async with http.get(f"/v1/jobs/{job.job_id}/stream") as first:
        assert first.status == 200
        await first.content.readline()
        second = await http.get(f"/v1/jobs/{job.job_id}/stream")
        assert second.status == 429 and second.headers["Retry-After"]


async def test_live_logs_of_one_job_flow_while_somebody_follows(
    world_with_nats, nats_server, tmp_path, read_sse, eventually
):
    world = world_with_nats
    live = world.gateway.live_logs
    await eventually(lambda: live._client is not None)
    job, task, executor = world.jobs.add(), new_id(), new_id()
    publisher = await connect(nats_server.issuer.service(EVERYTHING, tmp_path), EVERYTHING)
    subject = log_subject(executor, task, 1)
    forged = log_subject(new_id(), task, 1)
    assigned = encode(TaskAssigned(1, executor, "session", 6_000))

    def batch(job_id: str, text: str) -> bytes:
        return msgspec.json.encode(
            LogBatch(job=job_id, task=task, attempt=1, lines=(LogLine(ts_us=1, level="info", text=text),))
        )

    async with world.session() as http, http.get(f"/v1/jobs/{job.job_id}/logs/stream") as response:
        await response.content.readuntil(b": following\n")
        await publisher.publish(subject, batch(new_id(), "of another job"))
        await publisher.publish(forged, batch(job.job_id, "of another executor, before it is known"))
        await publisher.publish(subject, b"not json")
        await publisher.publish(subject, batch(job.job_id, "hello\nthere"))
        await publisher.flush()
        await world.jobs.record(job.job_id, "TaskAssigned", assigned, task)
        events = await read_sse(response, 1)
        assert json.loads(events[0]["data"])["lines"][0]["text"] == "hello\nthere"
        await publisher.publish(forged, batch(job.job_id, "of another executor"))
        await publisher.publish(subject, batch(job.job_id, "last words"))
        await publisher.flush()
        await world.jobs.record(job.job_id, "JobSucceeded")
        events = await read_sse(response)
    assert json.loads(events[0]["data"])["lines"][0]["text"] == "last words"
    assert events[-1]["data"] == "[DONE]"
    await eventually(lambda: live._subscription is None)
    await publisher.close()


async def test_live_logs_without_nats_are_503(world, http):
    job = world.jobs.add()
    response = await http.get(f"/v1/jobs/{job.job_id}/logs/stream")
    assert response.status == 503 and response.headers["Retry-After"]
