"""The model surfaces as the gateway serves them; what they answer in general is tested where they are made."""

import asyncio
import contextlib
import json

import aiohttp
import pytest
from hive_common.kernel.errors import InvalidArgument, NotFound, RateLimited, Unavailable
from hive_common.kernel.ids import is_id, new_id
from hive_common.ops.lifecycle import Stop
from hive_gateway.bootstrap import Gateway

CHAT = "/v1/chat/completions"
BODY = b'{ "model": "m", "messages": [], "seed": 7, "unheard_of": {"\\u00e9": 1e400} }'


async def test_a_call_reaches_the_router_as_it_came_with_what_is_known_of_its_caller(world, http):
    headers = {"X-Hive-Timeout-Ms": "4321", "X-Hive-Pin": "own-devices"}
    response = await http.post(CHAT, data=BODY, headers=headers)
    assert response.status == 200 and await response.read() == world.models.parts[0]
    request = world.models.requests[0]
    assert request.body == BODY and request.endpoint == "chat" and request.model == "m" and not request.stream
    assert request.caller == world.caller and request.key == "admin" and request.pin == "own-devices"
    assert response.headers["x-request-id"] == request.call_id and is_id(request.call_id)
    assert response.headers["X-Hive-Route"] == "pool" and response.headers["X-Hive-Executor"] == "e"


async def test_a_stream_passes_event_by_event(world, http):
    world.models.parts = [b'data: {"n": 1}\n\n', b"data: [DONE]\n\n"]
    async with http.post(CHAT, json={"model": "m", "stream": True}) as response:
        assert response.headers["Content-Type"] == "text/event-stream"
        assert await response.read() == b"".join(world.models.parts)
    assert world.models.requests[0].stream


async def test_calls_share_a_connection_which_is_opened_again_after_it_broke(world, http):
    answers = await asyncio.gather(*(http.post(CHAT, data=BODY) for _ in range(8)))
    assert {await answer.read() for answer in answers} == {world.models.parts[0]}
    assert world.exchange.connections == 1 and len({answer.headers["x-request-id"] for answer in answers}) == 8
    world.models.hold = True
    world.models.answering.clear()
    waiting = asyncio.create_task(http.post(CHAT, data=BODY))
    async with asyncio.timeout(20):
        await world.models.answering.wait()
    port = await world.stop_peer("router")
    answer = await waiting
    assert answer.status == 503 and (await answer.json())["error"]["code"] == "unavailable"
    world.models.hold = False
    await world.start_peer("router", port)
    async with asyncio.timeout(20):
        while (await http.post(CHAT, data=BODY)).status != 200:
            await asyncio.sleep(0.02)
    assert world.exchange.connections == 2


async def test_the_router_may_go_on_with_a_stream_as_it_is_read(world, http, eventually):
    piece = b'data: {"n": "%b"}\n\n' % (b"1" * 50_000)
    world.models.parts = [piece, piece, piece, b"data: [DONE]\n\n"]
    world.models.hold = True
    async with http.post(CHAT, json={"model": "m", "stream": True}) as response:
        assert await response.content.readexactly(3 * len(piece))
        await eventually(lambda: sum(world.exchange.grants) >= 2 * len(piece))
    await eventually(world.models.cancelled.is_set)


@pytest.mark.parametrize("breaks", [None, Unavailable("the device is gone")])
async def test_a_stream_never_ends_in_silence(world, http, breaks):
    world.models.parts = [b'data: {"n": 1}\n\n']
    world.models.breaks = breaks
    async with http.post(CHAT, json={"model": "m", "stream": True}) as response:
        events = (await response.read()).split(b"\n\n")
    assert events[0] == b'data: {"n": 1}' and events[-1] == b""
    error = json.loads(events[1].removeprefix(b"data: "))["error"]
    assert error["code"] == "unavailable"
    assert len(events) == 3


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels_at_the_router(world, http, eventually, stream):
    world.models.parts, world.models.hold = [b'data: {"n": 1}\n\n'], True
    async with aiohttp.ClientSession(world.url, headers=http.headers) as client:
        timeout = aiohttp.ClientTimeout(30 if stream else 2)
        request = client.post(CHAT, json={"model": "m", "stream": stream}, timeout=timeout)
        if stream:
            async with request as response:
                await response.content.readany()
        else:
            with pytest.raises(TimeoutError):
                await request
    await eventually(world.models.cancelled.is_set)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry_after"),
    [
        (NotFound("no such model", nearest=["m1"]), 404, "model_not_found", None),
        (InvalidArgument("too long", reason="context_length_exceeded"), 400, "context_length_exceeded", None),
        (InvalidArgument("bad", path="temperature"), 400, "invalid_argument", None),
        (RateLimited("full", retry_after_s=2.5), 429, "rate_limit_exceeded", "3"),
        (Unavailable("own-devices: none has it"), 503, "unavailable", "1"),
    ],
)
async def test_errors_have_openais_shape(world, http, error, status, code, retry_after):
    world.models.error = error
    response = await http.post(CHAT, data=BODY)
    shown = (await response.json())["error"]
    assert response.status == status and shown["code"] == code and shown["message"] == error.message
    assert response.headers.get("Retry-After") == retry_after and is_id(response.headers["x-request-id"])


async def test_a_stranger_is_told_in_openais_shape_and_the_router_hears_nothing(world):
    async with world.session(None) as stranger:
        for path in (CHAT, "/v1/models", "/v1/models/x"):
            response = await stranger.post(path, data=BODY)
            await response.read()
            assert response.status == 401 and is_id(response.headers["x-request-id"])
            assert (await response.json())["error"]["code"] == "invalid_api_key"
    assert not world.models.requests


async def test_a_model_is_shown_and_an_unknown_one_has_neighbours(world, http):
    assert (await (await http.get("/v1/models/smollm2:135m")).json())["executors"] == ["e"]
    response = await http.get("/v1/models/smollm2")
    assert response.status == 404
    error = (await response.json())["error"]
    assert error["code"] == "model_not_found" and "`smollm2:135m`" in error["message"]


async def test_why_a_call_went_where_it_went_is_told(world, http):
    call_id = (await http.post(CHAT, data=BODY)).headers["x-request-id"]
    shown = await (await http.get(f"/v1/model-calls/{call_id}/explain")).json()
    assert shown["call_id"] == call_id and shown["candidates"][0]["rejected"] == "offline"
    assert (await http.get(f"/v1/model-calls/{new_id()}/explain")).status == 404


class TestOllama:
    async def test_a_conversation_is_translated_there_and_back(self, world, http):
        world.models.parts = [
            b'data: {"choices": [{"delta": {"content": "hi"}}]}\n\n',
            b'data: {"choices": [{"delta": {}, "finish_reason": "stop"}]}\n\n',
            b'data: {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}\n\ndata: [DONE]\n\n',
        ]
        body = {"model": "m", "messages": [{"role": "user", "content": "say hi"}], "options": {"num_predict": 5}}
        async with http.post("/api/chat", json=body) as response:
            assert response.headers["Content-Type"] == "application/x-ndjson"
            lines = [json.loads(line) for line in (await response.read()).splitlines()]
        assert [line["message"]["content"] for line in lines] == ["hi", ""]
        assert lines[-1]["done"] and lines[-1]["eval_count"] == 1 and lines[-1]["prompt_eval_count"] == 3
        sent = json.loads(world.models.requests[0].body)
        assert sent["max_tokens"] == 5 and sent["stream"] and sent["messages"] == body["messages"]

    async def test_strangers_are_told_how_to_let_programs_in(self, world):
        async with world.session(None) as stranger:
            for path in ("/api/tags", "/api/version", "/"):
                response = await stranger.get(path)
                assert response.status == 401
                assert "--ollama-without-key" in (await response.json())["error"]

    async def test_programs_of_this_machine_are_let_in_where_the_owner_says_so(self, world, tmp_path):
        async with contextlib.AsyncExitStack() as stack:
            gateway = Gateway(world.config(ollama_without_key=True))
            stack.push_async_callback(gateway.peers.close)
            await gateway.start(Stop(), stack)
            async with aiohttp.ClientSession(f"http://127.0.0.1:{gateway.http_port}") as program:
                assert await (await program.get("/")).text() == "Ollama is running"
                assert (await (await program.get("/api/tags")).json())["models"][0]["name"] == "smollm2:135m"
                page = await program.get("/api/tags", headers={"Origin": "https://example.com"})
                rebound = await program.get("/api/tags", headers={"Host": "example.com"})
                assert page.status == rebound.status == 403 and "web" in (await page.json())["error"]
                # Nothing else became open, and a wrong key stays one.
                assert (await program.get("/v1/models")).status == 401
                assert (await program.get("/v1/jobs")).status == 401
                assert (await program.get("/api/tags", headers={"Authorization": "Bearer x"})).status == 401
