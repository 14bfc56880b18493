"""Calls to back ends: bytes pass, cancellation arrives, failures are told in the catalogue, streams do not lie."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.inference import backend, backends
from hive_common.inference.backends import BackEnds
from hive_common.inference.calls import Answer, Endpoint, ModelCall
from hive_common.inference.config import BackEndConfig
from hive_common.inference.sse import DONE, Events, data_of
from hive_common.kernel.errors import (
    DeadlineExceeded,
    HiveError,
    InvalidArgument,
    NotFound,
    RateLimited,
    Unavailable,
)
from hive_common.ops.ports import free_port
from hive_common.testing.scripted import ScriptedBackEnd, ScriptedModel, text_of

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def call(
    model: str = "scripted",
    *,
    endpoint: Endpoint = "chat",
    deadline_ms: int = 20_000,
    stream: bool = False,
    **more: Any,
) -> ModelCall:
    fields = {"messages": [{"role": "user", "content": "count for me"}], "model": model, **more}
    if stream:
        fields["stream"] = True
    body = msgspec.json.encode(fields)
    return ModelCall(id="call", endpoint=endpoint, model=model, body=body, stream=stream, deadline_ms=deadline_ms)


async def whole(answer: Answer) -> bytes:
    return b"".join([chunk async for chunk in answer.chunks])


def texts(stream: bytes) -> str:
    found = ""
    for event in Events().feed(stream):
        if event != DONE and b'"choices"' in event:
            (choice,) = msgspec.json.decode(data_of(event) or b"")["choices"]
            found += choice["delta"].get("content") or ""
    return found


def last_error(stream: bytes) -> dict[str, Any]:
    error: dict[str, Any] = msgspec.json.decode(data_of(Events().feed(stream)[-1]) or b"")["error"]
    return error


async def test_the_body_goes_there_as_it_came_and_the_answer_comes_as_it_is(scripted: ScriptedBackEnd) -> None:
    sent = call(seed=7, unknown={"kept": ["as", "is"]})
    async with BackEnds([scripted.url]) as back_ends:
        answer = await back_ends.complete(sent)
        body = msgspec.json.decode(await whole(answer))
    assert scripted.calls[0].body == sent.body
    assert scripted.calls[0].headers["x-request-id"] == "call"
    assert (answer.head.status, answer.head.content_type) == (200, "application/json")
    assert body["choices"][0]["message"]["content"] == text_of(16)


@pytest.mark.parametrize("pace_ms", [0, 1])
async def test_a_stream_arrives_whole_in_whole_events(scripted: ScriptedBackEnd, pace_ms: float) -> None:
    scripted.play(tokens=300, pace_ms=pace_ms)
    async with BackEnds([scripted.url]) as back_ends:
        answer = await back_ends.complete(call(stream=True))
        chunks = [chunk async for chunk in answer.chunks]
        assert back_ends.all[0].in_flight == 0
    assert all(chunk.endswith(b"\n\n") for chunk in chunks)
    assert texts(b"".join(chunks)) == text_of(300) and chunks[-1].endswith(DONE)


async def test_connections_are_used_again(scripted: ScriptedBackEnd) -> None:
    async with BackEnds([scripted.url]) as back_ends:
        connections = scripted.counts.connections
        for stream in (False, True, False, True):
            await whole(await back_ends.complete(call(stream=stream)))
        assert scripted.counts.connections == connections


@pytest.mark.parametrize("chunks_read", [0, 1])
async def test_closing_a_stream_ends_the_generation_there(scripted: ScriptedBackEnd, chunks_read: int) -> None:
    scripted.play(tokens=1_000_000, pace_ms=1)
    async with BackEnds([scripted.url]) as back_ends:
        answer = await back_ends.complete(call(stream=True))
        for _ in range(chunks_read):
            await anext(answer.chunks)
        closed_s = asyncio.get_running_loop().time()
        await answer.chunks.aclose()
        assert back_ends.all[0].in_flight == 0
        await scripted.until(lambda: scripted.counts.cancelled == 1)
        assert scripted.generations[0].ended_s - closed_s < 0.8  # four times the bound of 200 ms


@pytest.mark.parametrize("stream", [True, False])
async def test_cancelling_a_call_that_has_not_begun_ends_the_generation_there(
    scripted: ScriptedBackEnd, stream: bool
) -> None:
    scripted.play(tokens=1_000_000, first_token_ms=1_000_000, pace_ms=1)
    async with BackEnds([scripted.url]) as back_ends:
        calling = asyncio.create_task(back_ends.complete(call(stream=stream)))
        await scripted.until(lambda: scripted.counts.active == 1)
        calling.cancel()
        await scripted.until(lambda: scripted.counts.cancelled == 1)
        await asyncio.wait({calling})
        assert calling.cancelled() and back_ends.all[0].in_flight == 0


@pytest.mark.parametrize("breaking", ["drop_after", "stop_after", "error_after"])
async def test_a_stream_that_breaks_ends_in_an_error_event(scripted: ScriptedBackEnd, breaking: str) -> None:
    scripted.play(**{breaking: 5, "pace_ms": 1})
    async with BackEnds([scripted.url]) as back_ends:
        stream = await whole(await back_ends.complete(call(stream=True)))
    assert texts(stream) == text_of(5) and DONE not in stream
    assert last_error(stream)["message"]


async def test_a_stream_that_falls_silent_ends_in_an_error_event(
    scripted: ScriptedBackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "SILENCE_S_MAX", 0.05)
    scripted.play(hang_after=5)
    async with BackEnds([scripted.url]) as back_ends:
        stream = await whole(await back_ends.complete(call(stream=True)))
    assert texts(stream) == text_of(5) and "silent" in last_error(stream)["message"]


async def test_what_fails_before_the_first_event_is_an_error_of_the_call(scripted: ScriptedBackEnd) -> None:
    async with BackEnds([scripted.url]) as back_ends:
        for breaking in ("drop_after", "stop_after", "error_after"):
            scripted.play(drop_after=None, stop_after=None, error_after=None, first_token_ms=1)
            scripted.play(**{breaking: 0})
            with pytest.raises(Unavailable):
                await back_ends.complete(call(stream=True))
        with pytest.raises(Unavailable):
            await back_ends.complete(call())
        assert back_ends.all[0].in_flight == 0


async def test_a_deadline_before_the_first_event_and_after_it(scripted: ScriptedBackEnd) -> None:
    async with BackEnds([scripted.url]) as back_ends:
        scripted.play(hang_after=0)
        for stream in (True, False):
            with pytest.raises(DeadlineExceeded):
                await back_ends.complete(call(stream=stream, deadline_ms=50))
        scripted.play(hang_after=5)
        stream_bytes = await whole(await back_ends.complete(call(stream=True, deadline_ms=2_000)))
        assert last_error(stream_bytes)["code"] == "deadline_exceeded"
        await scripted.until(lambda: scripted.counts.cancelled == 3)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, InvalidArgument),
        (422, InvalidArgument),
        (401, Unavailable),
        (404, NotFound),
        (429, RateLimited),
        (500, Unavailable),
        (502, Unavailable),
        (503, Unavailable),
        (504, DeadlineExceeded),
    ],
)
async def test_a_refusal_is_told_in_the_catalogue(
    scripted: ScriptedBackEnd, status: int, kind: type[HiveError]
) -> None:
    scripted.play(error_status=status, retry_after_s=7)
    async with BackEnds([scripted.url]) as back_ends:
        for stream in (True, False):
            with pytest.raises(kind, match="scripted error") as raised:
                await back_ends.complete(call(stream=stream))
        assert raised.value.fields.get("retry_after_s") == (7 if status in (429, 503) else None)
        scripted.play(error_status=0)
        await whole(await back_ends.complete(call()))


async def test_an_overflow_of_the_context_says_so(scripted: ScriptedBackEnd) -> None:
    scripted.play(context_tokens=2)
    async with BackEnds([scripted.url]) as back_ends:
        with pytest.raises(InvalidArgument) as raised:
            await back_ends.complete(call())
    assert raised.value.fields["reason"] == "context_length_exceeded"


async def test_a_model_that_is_not_there_is_not_found_also_where_any_name_is_answered(
    scripted: ScriptedBackEnd,
) -> None:
    scripted.play(flavour="llama.cpp", models=(ScriptedModel(name="llama3.2"),))
    async with BackEnds([scripted.url]) as back_ends:
        with pytest.raises(NotFound) as raised:
            await back_ends.complete(call("llama32"))
        assert raised.value.fields["nearest"] == ("llama3.2",)
    assert not scripted.calls


async def test_a_model_that_came_meanwhile_is_found(
    scripted: ScriptedBackEnd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backends, "LOOK_AGAIN_S", 0.0)
    async with BackEnds([scripted.url]) as back_ends:
        scripted.play(models=(ScriptedModel(name="new"),))
        assert await whole(await back_ends.complete(call("new")))


async def test_a_tag_may_be_left_out(scripted: ScriptedBackEnd) -> None:
    scripted.play(flavour="ollama", models=(ScriptedModel(name="llama3:latest"),))
    async with BackEnds([scripted.url]) as back_ends:
        await whole(await back_ends.complete(call("llama3", seed=3)))
    assert msgspec.json.decode(scripted.calls[0].body) == {
        **msgspec.json.decode(call("llama3", seed=3).body),
        "model": "llama3:latest",
    }


async def test_tools_are_refused_where_they_would_be_dropped(scripted: ScriptedBackEnd) -> None:
    scripted.play(flavour="llama.cpp", models=(ScriptedModel(tools=False),))
    async with BackEnds([scripted.url]) as back_ends:
        with pytest.raises(InvalidArgument) as raised:
            await back_ends.complete(call(tools=TOOLS))
        assert raised.value.fields == {"reason": "unsupported", "need": "tools", "path": "tools"}
        await whole(await back_ends.complete(call(tools=[])))
        scripted.play(models=(ScriptedModel(tools=True),))
        await back_ends.look()
        assert b"tool_calls" in await whole(await back_ends.complete(call(tools=TOOLS)))
    assert len(scripted.calls) == 2


LLAMA = {"flavour": "llama.cpp"}


@pytest.mark.parametrize("more", [{}, {"tools": TOOLS}, {"max_tokens": 3}])
async def test_llama_cpp_streams_every_answer_so_that_it_sees_who_left(
    scripted: ScriptedBackEnd, more: dict[str, Any]
) -> None:
    async with BackEnds([scripted.url]) as back_ends:
        plain = msgspec.json.decode(await whole(await back_ends.complete(call(**more))))
        scripted.play(**LLAMA)
        await back_ends.look()
        answer = await back_ends.complete(call(**more))
        joined = msgspec.json.decode(await whole(answer))
        assert back_ends.all[0].in_flight == 0
    assert [generation.stream for generation in scripted.generations] == [False, True]
    assert answer.head.content_type == "application/json"
    for body in (plain, joined):
        body["choices"][0].pop("logprobs", None)
        for tool in body["choices"][0]["message"].get("tool_calls", ()):
            tool.pop("index", None)
        body["choices"][0]["message"]["content"] = body["choices"][0]["message"]["content"] or ""
    assert joined == plain


@pytest.mark.parametrize(("breaking", "kind"), [("drop_after", Unavailable), ("error_after", Unavailable)])
async def test_an_answer_of_llama_cpp_that_breaks_off_is_an_error(
    scripted: ScriptedBackEnd, breaking: str, kind: type[HiveError]
) -> None:
    scripted.play(**LLAMA, **{breaking: 3})
    async with BackEnds([scripted.url]) as back_ends:
        with pytest.raises(kind):
            await back_ends.complete(call())
        scripted.play(**{breaking: None, "hang_after": 3})
        with pytest.raises(DeadlineExceeded):
            await back_ends.complete(call(deadline_ms=200))
        assert back_ends.all[0].in_flight == 0
        await scripted.until(lambda: scripted.counts.active == 0)


async def test_completions_and_embeddings_go_to_their_paths(scripted: ScriptedBackEnd) -> None:
    async with BackEnds([scripted.url]) as back_ends:
        await whole(await back_ends.complete(call(endpoint="completions", prompt="one two")))
        await whole(await back_ends.complete(call(endpoint="embeddings", input=["one", "two"])))
    assert [request.path for request in scripted.calls] == ["/v1/completions", "/v1/embeddings"]


async def test_the_next_back_end_serves_what_the_first_cannot(scripted: ScriptedBackEnd) -> None:
    async with ScriptedBackEnd() as other, BackEnds([scripted.url, other.url]) as back_ends:
        scripted.play(error_status=503)
        await whole(await back_ends.complete(call()))
        await scripted.stop()
        await whole(await back_ends.complete(call()))
        assert other.counts.completed == 2
        assert [model.name for model in back_ends.found] == ["scripted"]


async def test_one_that_went_away_is_unavailable(scripted: ScriptedBackEnd) -> None:
    async with BackEnds([scripted.url, f"http://127.0.0.1:{free_port()}"]) as back_ends:
        await scripted.stop()
        with pytest.raises(Unavailable, match="cannot be reached"):
            await back_ends.complete(call())


async def test_calls_at_once_are_bounded(scripted: ScriptedBackEnd) -> None:
    scripted.play(tokens=1_000_000, pace_ms=1)
    async with BackEnds([scripted.url], calls_max=2) as back_ends:
        running = [await back_ends.complete(call(stream=True)) for _ in range(2)]
        with pytest.raises(RateLimited):
            await back_ends.complete(call(stream=True))
        await running[0].chunks.aclose()
        running[0] = await back_ends.complete(call(stream=True))
        for answer in running:
            await answer.chunks.aclose()


async def test_a_key_is_shown_and_a_wrong_one_is_nobodys_fault_but_the_owners(
    scripted: ScriptedBackEnd, tmp_path: Path
) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("secret-of-the-back-end\n")
    key_file.chmod(0o600)
    scripted.play(api_key="secret-of-the-back-end")
    async with BackEnds([BackEndConfig(scripted.url, str(key_file))]) as back_ends:
        await whole(await back_ends.complete(call()))
        scripted.play(api_key="another")
        with pytest.raises(Unavailable, match="refuses the key") as raised:
            await back_ends.complete(call())
        assert "secret-of-the-back-end" not in raised.value.message
    key_file.chmod(0o644)
    with pytest.raises(InvalidArgument, match="others may read it"):
        await BackEnds([BackEndConfig(scripted.url, str(key_file))]).open()
