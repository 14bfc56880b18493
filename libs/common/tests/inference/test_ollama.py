"""Ollama's API in front of a back end that is called in OpenAI's language."""

import asyncio
import json

import aiohttp
import msgspec
import ollama
import pytest
from hive_common.inference import ollama_calls as calls
from hive_common.inference.ollama_answers import Completions
from hive_common.kernel.errors import InvalidArgument
from hive_common.testing.scripted import text_of

HELLO = [{"role": "user", "content": "count for me"}]


@pytest.fixture
def client(world):
    return ollama.AsyncClient(world.url)


class TestOfficialClient:
    async def test_a_conversation(self, client):
        answer = await client.chat("scripted", HELLO)
        assert answer.message.content == text_of(5) and answer.done and answer.done_reason == "stop"
        assert answer.eval_count == 5 and answer.prompt_eval_count == 3 and answer.total_duration > 0

    async def test_a_conversation_in_lines(self, client):
        parts = [part async for part in await client.chat("scripted", HELLO, stream=True)]
        assert "".join(part.message.content for part in parts) == text_of(5)
        assert [part.done for part in parts] == [False] * 5 + [True] and parts[-1].eval_count == 5

    async def test_the_synchronous_one(self, world):
        def count() -> str:
            parts = ollama.Client(world.url).generate("scripted", "count", stream=True)
            return "".join(part.response for part in parts)

        assert await asyncio.to_thread(count) == text_of(5)

    async def test_a_text_that_goes_on(self, client, world):
        answer = await client.generate("scripted", "count", raw=True, options={"num_predict": 2})
        assert answer.response == text_of(2) and answer.done_reason == "length"
        assert world.back_end.calls[-1].path == "/v1/completions"

    async def test_tools_whole_and_in_lines(self, client):
        def weather(city: str) -> str:
            """Tell the weather.

            Args:
                city: where
            """
            return city

        answer = await client.chat("scripted", HELLO, tools=[weather])
        assert answer.message.tool_calls[0].function.name == "weather"
        parts = [part async for part in await client.chat("scripted", HELLO, tools=[weather], stream=True)]
        (called,) = [call for part in parts for call in part.message.tool_calls or ()]
        assert called.function.name == "weather" and called.function.arguments == {} and parts[-1].done

    async def test_vectors_in_both_forms(self, client):
        answer = await client.embed("vectors", ["a", "b"])
        assert [vector[0] for vector in answer.embeddings] == [0.5, 1.5]
        assert (await client.embeddings("vectors", "a")).embedding[0] == 0.5

    async def test_what_is_there(self, client):
        listed = (await client.list()).models
        assert [model.model for model in listed] == ["scripted", "vectors:latest"] and listed[0].size == 1_000_000
        assert [model.model for model in (await client.ps()).models] == ["scripted", "vectors:latest"]
        shown = await client.show("vectors")
        assert shown.modelinfo["script.context_length"] == 4096 and "embedding" in shown.capabilities

    async def test_an_unknown_model(self, client):
        for call in (client.show, client.chat, client.generate):
            with pytest.raises(ollama.ResponseError) as caught:
                await call("nobody")
            assert caught.value.status_code == 404 and "nobody" in caught.value.error

    async def test_a_stream_that_breaks_off_is_an_error(self, client, world):
        world.back_end.play(drop_after=2)
        text = ""
        with pytest.raises(ollama.ResponseError):
            async for part in await client.chat("scripted", HELLO, stream=True):
                text += part.message.content
        assert text == text_of(2)

    async def test_a_model_is_only_looked_up_where_it_should_be_loaded(self, client, world):
        assert (await client.generate("scripted")).done_reason == "load"
        assert (await client.chat("scripted", keep_alive=0)).done_reason == "unload"
        assert not world.back_end.calls


async def test_answers_come_in_lines_where_nothing_is_said(world):
    async with aiohttp.ClientSession(world.url) as http:
        response = await http.post("/api/generate", data=json.dumps({"model": "scripted", "prompt": "x"}))
        assert response.content_type == "application/x-ndjson"
        assert len((await response.read()).splitlines()) == 6
        assert await (await http.get("/")).text() == "Ollama is running"
        assert (await http.head("/")).status == 200
        assert "version" in await (await http.get("/api/version")).json()


async def test_a_client_that_goes_away_ends_the_generation(world):
    world.back_end.play(tokens=100_000, pace_ms=5)
    async with aiohttp.ClientSession(world.url) as http:
        response = await http.post("/api/chat", json={"model": "scripted", "messages": HELLO})
        await response.content.readany()
    await world.back_end.until(lambda: world.back_end.counts.cancelled == 1)


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/api/chat", b'{"model": "scripted", "messages": [}', 400),
        ("POST", "/api/chat", b"{}", 400),
        ("POST", "/api/embed", b'{"model": "vectors"}', 400),
        ("POST", "/api/generate", b'{"model": "scripted", "prompt": "x", "template": "{{ .Prompt }}"}', 400),
        ("POST", "/api/generate", b'{"model": "scripted", "prompt": "x", "context": [1]}', 400),
        ("POST", "/api/pull", b'{"model": "scripted"}', 501),
        ("GET", "/api/nothing", b"", 404),
        ("GET", "/api/chat", b"", 405),
    ],
)
async def test_errors_have_ollamas_shape(world, method, path, body, status):
    async with aiohttp.ClientSession(world.url) as http:
        response = await http.request(method, path, data=body)
        shown = await response.json()
    assert response.status == status and list(shown) == ["error"] and shown["error"]


class TestTranslation:
    def sent(self, **fields):
        asked = msgspec.json.decode(msgspec.json.encode({"model": "m", **fields}), type=calls.Chat)
        return json.loads(calls.chat_body(asked))

    def test_options_have_openais_names(self):
        options = {"temperature": 0, "top_p": 0.5, "seed": 7, "stop": ["\n"], "num_predict": 9, "num_ctx": 4096}
        sent = self.sent(messages=HELLO, options=options, stream=False)
        assert sent == {
            "model": "m",
            "messages": HELLO,
            "temperature": 0,
            "top_p": 0.5,
            "seed": 7,
            "stop": ["\n"],
            "max_tokens": 9,
        }
        assert "max_tokens" not in self.sent(messages=HELLO, options={"num_predict": -1})

    def test_formats(self):
        schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
        assert self.sent(messages=HELLO, format="json")["response_format"] == {"type": "json_object"}
        sent = self.sent(messages=HELLO, format=schema)["response_format"]
        assert sent["type"] == "json_schema" and sent["json_schema"]["schema"] == schema
        assert "response_format" not in self.sent(messages=HELLO, format="")
        with pytest.raises(InvalidArgument, match="format"):
            self.sent(messages=HELLO, format=7)

    def test_tools_are_answered_by_their_calls(self):
        call = {"function": {"name": "weather", "arguments": {"city": "Berlin"}}}
        other = {"function": {"name": "time", "arguments": {}}}
        answers = [{"role": "tool", "content": "12:00", "tool_name": "time"}, {"role": "tool", "content": "rain"}]
        sent = self.sent(messages=[{"role": "assistant", "content": "", "tool_calls": [call, other]}, *answers])
        first, second = sent["messages"][0]["tool_calls"]
        assert json.loads(first["function"]["arguments"]) == {"city": "Berlin"}
        assert [message["tool_call_id"] for message in sent["messages"][1:]] == [second["id"], first["id"]]

    def test_images_become_parts(self):
        message = {"role": "user", "content": "what is it", "images": ["iVBORw0KGgoAAAANSUhEUgAA"]}
        text, image = self.sent(messages=[message])["messages"][0]["content"]
        assert text["text"] == "what is it" and image["image_url"]["url"].startswith("data:image/png;base64,iVBOR")
        with pytest.raises(InvalidArgument, match="base64"):
            self.sent(messages=[message | {"images": ["%%%"]}])

    def test_arguments_of_tools_are_put_together_from_their_pieces(self):
        shape = Completions("chat", "m")
        pieces = [{"id": "c", "function": {"name": "weather", "arguments": '{"ci'}}]
        more = [{"index": 0, "function": {"arguments": 'ty": "Berlin"}'}}]
        for part in (pieces, more):
            chunk = {"choices": [{"delta": {"tool_calls": part}}]}
            assert shape.piece(b"data: %b\n\n" % json.dumps(chunk).encode()) == b""
        first, last = map(json.loads, shape.piece(b"data: [DONE]\n\n").splitlines())
        (call,) = first["message"]["tool_calls"]
        assert call == {"id": "c", "function": {"name": "weather", "arguments": {"city": "Berlin"}}}
        assert last["done"] and shape.end() == b""

    def test_thoughts_and_probabilities_are_kept(self):
        shape = Completions("chat", "m")
        top = [{"token": "a", "logprob": -0.1, "bytes": [97]}]
        probabilities = {"content": [{"token": "a", "logprob": -0.1, "bytes": [97], "top_logprobs": top}]}
        choice = {"delta": {"content": "a", "reasoning_content": "hm"}, "logprobs": probabilities}
        shown = json.loads(shape.piece(b"data: %b\n\n" % json.dumps({"choices": [choice]}).encode()))
        assert shown["message"] == {"role": "assistant", "content": "a", "thinking": "hm"}
        assert shown["logprobs"][0]["top_logprobs"] == [{"token": "a", "logprob": -0.1}]

    def test_a_stream_without_an_end_ends_in_an_error(self):
        shape = Completions("generate", "m")
        assert "error" in json.loads(shape.end())

    def test_nothing_follows_the_end_of_a_stream(self):
        shape = Completions("generate", "m")
        assert json.loads(shape.piece(b"data: [DONE]\n\n"))["done"]
        assert shape.broken(InvalidArgument("late")) == shape.end() == b""
