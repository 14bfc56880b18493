"""OpenAI's API, used as its clients do: the official one, and raw where it matters what is on the wire."""

import asyncio
import json

import aiohttp
import openai
import pytest
from hive_common.inference.openai import OpenAIShape
from hive_common.kernel.errors import Unavailable
from hive_common.kernel.ids import is_id
from hive_common.testing.scripted import text_of

CHAT = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "count for me"}]


@pytest.fixture
async def client(world):
    async with openai.AsyncOpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture
async def http(world):
    async with aiohttp.ClientSession(world.url) as found:
        yield found


class TestOfficialClient:
    async def test_an_answer(self, client):
        answer = await client.chat.completions.create(model="scripted", messages=HELLO)
        assert answer.choices[0].message.content == text_of(5) and answer.usage.completion_tokens == 5
        assert is_id(answer._request_id)

    async def test_a_stream_with_its_usage(self, client):
        stream = await client.chat.completions.create(
            model="scripted", messages=HELLO, stream=True, stream_options={"include_usage": True}
        )
        chunks = [chunk async for chunk in stream]
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == text_of(5) and chunks[-1].usage.completion_tokens == 5

    async def test_the_synchronous_one(self, world):
        def count() -> list[str]:
            with openai.OpenAI(base_url=f"{world.url}/v1", api_key="none", max_retries=0) as client:
                stream = client.completions.create(model="scripted", prompt="count", stream=True)
                return [chunk.choices[0].text for chunk in stream]

        assert "".join(await asyncio.to_thread(count)) == text_of(5)

    async def test_tools(self, client):
        tool = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
        answer = await client.chat.completions.create(model="scripted", messages=HELLO, tools=[tool])
        assert answer.choices[0].message.tool_calls[0].function.name == "weather"

    async def test_embeddings(self, client):
        answer = await client.embeddings.create(model="vectors:latest", input=["a", "b"], encoding_format="float")
        assert [one.embedding[0] for one in answer.data] == [0.5, 1.5]

    async def test_models(self, client):
        assert [model.id async for model in client.models.list()] == ["scripted", "vectors:latest"]
        assert (await client.models.retrieve("scripted")).owned_by == "hivefabric"
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("scripte")
        assert caught.value.code == "model_not_found" and "`scripted`" in caught.value.message

    async def test_an_unknown_model_has_neighbours(self, client, world):
        with pytest.raises(openai.NotFoundError) as caught:
            await client.chat.completions.create(model="scriptet", messages=HELLO)
        assert caught.value.code == "model_not_found" and "`scripted`" in caught.value.message
        assert is_id(caught.value.request_id) and not world.back_end.calls

    async def test_an_overflow(self, client, world):
        world.back_end.play(context_tokens=2)
        with pytest.raises(openai.BadRequestError) as caught:
            await client.chat.completions.create(model="scripted", messages=HELLO)
        assert caught.value.code == "context_length_exceeded"

    async def test_a_back_end_that_is_busy(self, client, world):
        world.back_end.play(error_status=429, retry_after_s=7)
        with pytest.raises(openai.RateLimitError) as caught:
            await client.chat.completions.create(model="scripted", messages=HELLO)
        assert caught.value.response.headers["retry-after"] == "7"

    async def test_a_stream_that_breaks_off_is_an_error(self, client, world):
        world.back_end.play(drop_after=2)
        stream = await client.chat.completions.create(model="scripted", messages=HELLO, stream=True)
        text = ""
        with pytest.raises(openai.APIError):
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
        assert text == text_of(2)


class TestEndOfAStream:
    """What a client is told when what lies behind breaks off."""

    END = b'data: {"choices":[{"delta":{},"finish_reason":"stop"}]}\n\ndata: [DONE]\n\n'

    def test_nothing_follows_its_end(self):
        shape = OpenAIShape()
        shape.piece(self.END)
        assert shape.broken(Unavailable("gone")) == shape.end() == b""

    def test_nothing_follows_an_error(self):
        shape = OpenAIShape()
        shape.piece(b'data: {"error":{"message":"gone"}}\n\n')
        assert shape.broken(Unavailable("gone")) == shape.end() == b""

    @pytest.mark.parametrize("last", [b"", b'data: {"choices":[{"delta":{"content":"data: [DONE]"}}]}\n\n'])
    def test_without_an_end_there_is_an_error(self, last):
        shape = OpenAIShape()
        shape.piece(last)
        assert b'"error"' in shape.end()
        assert b'"gone"' in shape.broken(Unavailable("gone"))


async def test_a_body_passes_as_it_came(world, http):
    body = b'{"seed":7, "model": "scripted", "messages": [],\n "n": 2, "logprobs": true, "stop": ["\\u00e9"]}'
    assert (await http.post(CHAT, data=body)).status == 200
    assert world.back_end.calls[-1].body == body


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_ends_the_generation(world, stream):
    world.back_end.play(tokens=100_000, pace_ms=5)
    async with aiohttp.ClientSession(world.url) as http:
        asked = asyncio.create_task(
            http.post(CHAT, json={"model": "scripted", "messages": HELLO, "stream": stream})
        )
        await world.back_end.until(lambda: world.back_end.counts.active == 1)
        if stream:
            await (await asked).content.readany()
        asked.cancel()
    gone_s = asyncio.get_running_loop().time()
    await world.back_end.until(lambda: world.back_end.counts.cancelled == 1)
    (generation,) = world.back_end.generations
    # On a machine that has nothing else to do this takes some 2 ms; see the benchmark of model calls.
    assert generation.outcome == "cancelled" and generation.tokens < 100_000
    assert generation.ended_s - gone_s < 20


async def test_a_deadline_ends_a_whole_answer_and_a_stream(world, http):
    world.back_end.play(tokens=100_000, pace_ms=5)
    headers = {"X-Hive-Timeout-Ms": "2000"}
    whole = await http.post(CHAT, json={"model": "scripted", "messages": HELLO}, headers=headers)
    assert whole.status == 504 and (await whole.json())["error"]["code"] == "deadline_exceeded"
    stream = await http.post(CHAT, json={"model": "scripted", "messages": HELLO, "stream": True}, headers=headers)
    events = (await stream.read()).split(b"\n\n")
    assert b"deadline_exceeded" in events[-2]
    await world.back_end.until(lambda: world.back_end.counts.cancelled == 2)


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b'{"model": "scripted", "messages": [}', "byte 35"),
        (b'{"model": "scripted"', "byte 20"),
        (b"", "byte 0"),
        (b'{"model": "\xff"}', "byte 11"),
        (b"[]", "Expected `object`"),
        (b'{"model": 7}', "body.model: "),
        (b'{"messages": []}', "model"),
        (b'{"model": ""}', "body.model: "),
        (b'{"model": "m", "x": ' + b"[" * 100_000, "nested"),
    ],
)
async def test_a_bad_body_names_the_place(world, http, body, says):
    response = await http.post(CHAT, data=body)
    error = (await response.json())["error"]
    assert response.status == 400 and error["type"] == "invalid_request_error"
    assert says in error["message"], error
    assert is_id(response.headers["x-request-id"]) and not world.back_end.calls


async def test_a_body_that_is_too_large_is_413(world, http):
    async def too_much():
        for _ in range(9):
            yield b" " * (1 << 20)

    for data in (b" " * ((8 << 20) + 1), too_much()):
        response = await http.post(CHAT, data=data)
        assert response.status == 413 and (await response.json())["error"]["code"] == "payload_too_large"


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"X-Hive-Pin": "own-devices"}, 200),
        ({"X-Hive-Pin": "pool"}, 200),
        ({"X-Hive-Pin": "any"}, 403),
        ({"X-Hive-Pin": "everywhere"}, 400),
        ({"X-Hive-Timeout-Ms": "0"}, 400),
        ({"X-Hive-Timeout-Ms": "soon"}, 400),
    ],
)
async def test_a_call_may_narrow_its_pin_and_choose_its_time(world, http, headers, status):
    response = await http.post(CHAT, json={"model": "scripted", "messages": HELLO}, headers=headers)
    assert response.status == status, await response.text()


async def test_what_is_not_there_is_told_in_openais_shape(http):
    for method, path, status in (("GET", "/v1/nothing", 404), ("GET", CHAT, 405), ("POST", "/v1/models", 405)):
        response = await http.request(method, path)
        assert response.status == status and "message" in (await response.json())["error"]
        assert is_id(response.headers["x-request-id"])


class TestPagesOfTheWeb:
    @pytest.mark.parametrize(
        "headers",
        [
            {"Origin": "https://example.com"},
            {"Origin": "null"},
            {"Origin": "http://localhost.example.com"},
            {"Host": "example.com"},
            {"Host": "rebound.example.com:8500"},
            {"Sec-Fetch-Site": "cross-site"},
        ],
    )
    async def test_are_refused(self, world, http, headers):
        for path in (CHAT, "/api/chat"):
            response = await http.post(path, json={"model": "scripted", "messages": HELLO}, headers=headers)
            assert response.status == 403 and "access-control-allow-origin" not in response.headers
            assert is_id(response.headers["x-request-id"])
        assert not world.back_end.calls

    @pytest.mark.parametrize("origin", ["http://localhost:3000", "http://[::1]:1", "vscode-webview://abc"])
    async def test_of_this_machine_may_read_the_answers(self, http, origin):
        asked = {"Origin": origin, "Access-Control-Request-Headers": "authorization"}
        preflight = await http.options(CHAT, headers=asked)
        assert preflight.status == 204 and preflight.headers["access-control-allow-headers"] == "authorization"
        response = await http.get("/v1/models", headers={"Origin": origin})
        assert response.status == 200 and response.headers["access-control-allow-origin"] == origin
        assert json.loads(await response.read())["object"] == "list"
