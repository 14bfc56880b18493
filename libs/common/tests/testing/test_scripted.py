"""The scripted back end plays what it was told, and takes down what happened."""

import asyncio
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
import pytest
from hive_common.testing.scripted import Script, ScriptedBackEnd, ScriptedModel, ScriptedProcess, text_of

CHAT = "/v1/chat/completions"


def chat(**more: Any) -> dict[str, Any]:
    return {"model": "scripted", "messages": [{"role": "user", "content": "count for me"}], **more}


async def post(back_end: ScriptedBackEnd, body: dict[str, Any], path: str = CHAT) -> tuple[int, bytes]:
    async with aiohttp.ClientSession() as session, session.post(back_end.url + path, json=body) as answer:
        return answer.status, await answer.read()


def tokens_in(stream: bytes) -> str:
    events = [event.removeprefix(b"data: ") for event in stream.split(b"\n\n") if event]
    assert events.pop() == b"[DONE]"
    choices = [choice for event in events for choice in msgspec.json.decode(event)["choices"]]
    return "".join(choice["delta"].get("content") or "" for choice in choices)


async def test_a_whole_answer_has_all_tokens_and_their_count(scripted: ScriptedBackEnd) -> None:
    status, body = await post(scripted, chat())
    answer = msgspec.json.decode(body)
    assert status == 200
    assert answer["choices"][0]["message"]["content"] == text_of(16)
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 16, "total_tokens": 19}
    assert scripted.counts.completed == 1 and scripted.counts.tokens == 16


async def test_a_stream_has_the_same_tokens_and_usage_when_asked(scripted: ScriptedBackEnd) -> None:
    _, body = await post(scripted, chat(stream=True, max_tokens=5, stream_options={"include_usage": True}))
    assert tokens_in(body) == text_of(5)
    assert b'"completion_tokens":5' in body and b'"finish_reason":"length"' in body


async def test_an_answer_without_a_pace_waits_for_its_reader(scripted: ScriptedBackEnd) -> None:
    scripted.play(tokens=1_000_000)
    async with aiohttp.ClientSession() as session, session.post(scripted.url + CHAT, json=chat(stream=True)):
        await scripted.until(lambda: scripted.counts.paused > 0)
        assert 0 < scripted.counts.tokens < 1_000_000
    await scripted.until(lambda: scripted.counts.cancelled == 1)


async def test_a_pace_is_a_schedule(scripted: ScriptedBackEnd) -> None:
    scripted.play(tokens=5, first_token_ms=20, pace_ms=10)
    await post(scripted, chat(stream=True))
    generation = scripted.generations[0]
    assert generation.ended_s - generation.started_s >= 0.06


@pytest.mark.parametrize("stream", [True, False])
async def test_it_notices_that_a_client_left(scripted: ScriptedBackEnd, stream: bool) -> None:
    scripted.play(tokens=1_000_000, pace_ms=5)
    asking = asyncio.create_task(post(scripted, chat(stream=stream)))
    await scripted.until(lambda: scripted.counts.active == 1)
    asking.cancel()
    await scripted.until(lambda: scripted.counts.cancelled == 1)
    assert scripted.generations[0].outcome == "cancelled" and scripted.counts.active == 0


async def test_misbehaviour_on_demand(scripted: ScriptedBackEnd) -> None:
    scripted.play(drop_after=3)
    with pytest.raises(aiohttp.ClientError):
        await post(scripted, chat(stream=True))
    scripted.play(drop_after=None, stop_after=3)
    _, body = await post(scripted, chat(stream=True))
    assert b"[DONE]" not in body and b'"content":"2 "' in body
    scripted.play(stop_after=None, error_after=3)
    _, body = await post(scripted, chat(stream=True))
    assert body.endswith(b"\n\n") and b'data: {"error":' in body
    scripted.play(error_after=None, error_status=503, error_calls=1)
    assert [(await post(scripted, chat()))[0] for _ in range(2)] == [503, 200]


async def test_what_a_real_back_end_refuses(scripted: ScriptedBackEnd) -> None:
    scripted.play(context_tokens=10)
    status, body = await post(scripted, chat(max_tokens=20))
    assert status == 400 and b"context_length_exceeded" in body
    assert (await post(scripted, chat(model="other")))[0] == 404
    scripted.play(flavour="llama.cpp")
    assert (await post(scripted, chat(model="other")))[0] == 200


async def test_tools_are_called_where_the_model_has_them_and_dropped_where_not(scripted: ScriptedBackEnd) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    _, body = await post(scripted, chat(tools=tools))
    call = msgspec.json.decode(body)["choices"][0]["message"]["tool_calls"][0]
    assert call["function"]["name"] == "weather"
    scripted.play(models=(ScriptedModel(tools=False),))
    _, body = await post(scripted, chat(tools=tools))
    assert msgspec.json.decode(body)["choices"][0]["message"]["content"] == text_of(16)


async def test_completions_and_embeddings(scripted: ScriptedBackEnd) -> None:
    _, body = await post(scripted, {"model": "scripted", "prompt": "a b"}, "/v1/completions")
    assert msgspec.json.decode(body)["choices"][0]["text"] == text_of(16)
    _, body = await post(scripted, {"model": "scripted", "input": ["a", "b"]}, "/v1/embeddings")
    assert [one["index"] for one in msgspec.json.decode(body)["data"]] == [0, 1]


async def test_a_process_of_its_own_plays_what_it_is_told(tmp_path: Path) -> None:
    process = ScriptedProcess(tmp_path, Script(tokens=3))
    await asyncio.to_thread(process.start)
    try:
        await asyncio.to_thread(process.play, tokens=4)
        async with aiohttp.ClientSession() as session, session.post(process.url + CHAT, json=chat()) as answer:
            assert text_of(4).encode() in await answer.read()
        counts = await asyncio.to_thread(lambda: process.counts)
        assert (counts.requests, counts.completed, counts.tokens) == (1, 1, 4)
    finally:
        await asyncio.to_thread(process.stop)
