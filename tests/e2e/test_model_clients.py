"""The official clients and curl, against a real small model: at the gateway, and on a port of a joined machine.

The second machine has no model of that name: what is asked there goes through the router to the first one. It has a
scripted one instead, which the gateway reaches over NATS.
"""

import asyncio
import json
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ollama
import openai
import pytest
from hive_common.kernel.ids import is_id
from hive_common.testing.installation import Installation, wait_until
from hive_common.testing.scripted import Script, ScriptedModel, ScriptedProcess, text_of

HELLO: Any = [{"role": "user", "content": "What is the capital of France?"}]
FAR, VECTORS = "far", "vectors"
TOKENS = 12
TOOL: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tell the weather.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}


@dataclass(frozen=True)
class Door:
    """Where programs reach models, and what they show there."""

    url: str
    key: str
    route: str

    @property
    def headers(self) -> dict[str, str]:
        """For clients that have no place for a key."""
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}

    def openai(self) -> openai.OpenAI:
        """Return the official client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)

    def ollama(self) -> ollama.Client:
        """Return the official client."""
        return ollama.Client(self.url, headers=self.headers)


@dataclass(frozen=True)
class Both:
    """Two machines, and the name of the real model on the first."""

    installation: Installation
    model: str
    doors: dict[str, Door]


@pytest.fixture(scope="module")
def both() -> Iterator[Both]:
    """An installation with the small model, and a second home that has joined it."""
    pytest.importorskip("xllamacpp", reason="needs the extra `model`: make setup installs it")
    folder = Path(tempfile.mkdtemp(prefix="hive-models-"))
    installation, device = Installation(folder / "home"), Installation(folder / "device")
    # Tools and vectors need a model that can: the small one cannot.
    models = (ScriptedModel(name=FAR, tools=True), ScriptedModel(name=VECTORS, tools=False, embeds=True))
    script = Script(flavour="ollama", models=models, tokens=TOKENS)
    try:
        with ScriptedProcess(folder, script) as back_end:
            installation.hive("init", "--free-ports", "--executors", "1")
            installation.hive("up", "--detach", "--with-model")
            token = installation.json("executor", "token")["token"]
            device.hive("executor", "join", token, "--free-ports", "--detach", "--model-url", back_end.url)
            wait_until(lambda: len(_models(installation)) == 3, 60, "all models are listed")
            model = next(name for name in _models(installation) if name not in (FAR, VECTORS))
            yield Both(installation, model, _doors(installation, device))
    finally:
        device.hive("down", check=False)
        installation.hive("down", check=False)
        shutil.rmtree(folder, ignore_errors=True)


def _models(installation: Installation) -> list[str]:
    return [model["id"] for model in installation.get("/v1/models")["data"]]


def _doors(installation: Installation, device: Installation) -> dict[str, Door]:
    key = (installation.home / "api-key").read_text().strip()
    port = json.loads((device.home / "config" / "executor.json").read_text())["models_port"]
    return {
        "gateway": Door(installation.json("status")["endpoints"]["http"], key, "local"),
        "device": Door(f"http://127.0.0.1:{port}", "", "pool"),
    }


@pytest.fixture(params=["gateway", "device"])
def door(both: Both, request: pytest.FixtureRequest) -> Door:
    """Each place at which programs reach models."""
    return both.doors[request.param]


class TestOpenAI:
    def test_an_answer_is_the_models(self, both: Both, door: Door) -> None:
        with door.openai() as client:
            raw = client.chat.completions.with_raw_response.create(
                model=both.model, messages=HELLO, max_tokens=16, temperature=0, seed=1
            )
        answer = raw.parse()
        # So small a model knows no capitals, but it answers with words, and in more letters than ASCII's.
        assert len((answer.choices[0].message.content or "").split()) > 2
        assert answer.usage is not None and 0 < answer.usage.completion_tokens <= 16
        assert raw.headers["x-hive-route"] == door.route and is_id(raw.headers["x-request-id"])

    def test_a_stream_says_the_same_as_the_whole(self, both: Both, door: Door) -> None:
        settings: Any = {"model": both.model, "messages": HELLO, "max_tokens": 12, "temperature": 0, "seed": 1}
        with door.openai() as client:
            whole = client.chat.completions.create(**settings)
            stream = client.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
            chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0

    def test_what_routing_does_not_know_reaches_the_model(self, both: Both, door: Door) -> None:
        with door.openai() as client:
            answer = client.chat.completions.create(
                model=both.model, messages=HELLO, max_tokens=16, temperature=0, logprobs=True, top_logprobs=2
            )
            short = client.completions.create(
                model=both.model, prompt="One, two, three,", max_tokens=16, temperature=0, stop=["six"]
            )
        logprobs = answer.choices[0].logprobs
        assert logprobs is not None and logprobs.content and len(logprobs.content[0].top_logprobs) == 2
        assert "six" not in short.choices[0].text

    def test_the_asynchronous_client_streams_many_at_once(self, both: Both, door: Door) -> None:
        async def count(client: openai.AsyncOpenAI) -> str:
            stream = await client.chat.completions.create(model=FAR, messages=HELLO, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

        async def ask() -> list[str]:
            async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key=door.key or "none") as client:
                return await asyncio.gather(*(count(client) for _ in range(8)))

        assert asyncio.run(ask()) == [text_of(TOKENS)] * 8

    def test_tools_are_called_and_a_model_without_them_says_so(self, both: Both, door: Door) -> None:
        with door.openai() as client:
            answer = client.chat.completions.create(model=FAR, messages=HELLO, tools=[TOOL])
            called: Any = answer.choices[0].message.tool_calls
            assert [call.function.name for call in called] == ["weather"]
            with pytest.raises(openai.BadRequestError, match="tools"):
                client.chat.completions.create(model=both.model, messages=HELLO, tools=[TOOL])

    def test_embeddings(self, both: Both, door: Door) -> None:
        with door.openai() as client:
            answer = client.embeddings.create(model=VECTORS, input=["a", "b"], encoding_format="float")
        assert [one.embedding[0] for one in answer.data] == [0.5, 1.5]

    def test_models_and_what_is_none(self, both: Both, door: Door) -> None:
        with door.openai() as client:
            assert {model.id for model in client.models.list()} == {both.model, FAR, VECTORS}
            assert client.models.retrieve(both.model).id == both.model
            with pytest.raises(openai.NotFoundError) as caught:
                client.chat.completions.create(model=both.model + "x", messages=HELLO)
        assert caught.value.code == "model_not_found" and f"`{both.model}`" in caught.value.message

    def test_a_prompt_that_does_not_fit(self, both: Both, door: Door) -> None:
        long: Any = [{"role": "user", "content": "word " * 40_000}]
        with door.openai() as client, pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(model=both.model, messages=long, max_tokens=1)
        assert caught.value.code == "context_length_exceeded"

    def test_a_wrong_key(self, both: Both) -> None:
        door = both.doors["gateway"]
        wrong = Door(door.url, door.key + "x", door.route)
        with wrong.openai() as client, pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
        assert caught.value.code == "invalid_api_key" and is_id(caught.value.request_id or "")


class TestOllama:
    def test_a_conversation_whole_and_in_lines(self, both: Both, door: Door) -> None:
        options = {"temperature": 0, "num_predict": 12, "seed": 1}
        client = door.ollama()
        whole = client.chat(both.model, HELLO, options=options)
        parts = list(client.chat(both.model, HELLO, options=options, stream=True))
        assert whole.message.content and whole.eval_count
        assert "".join(part.message.content or "" for part in parts) == whole.message.content
        assert parts[-1].done and parts[-1].eval_count == whole.eval_count

    def test_texts_tools_and_vectors(self, both: Both, door: Door) -> None:
        client = door.ollama()
        answer = client.generate(both.model, "One, two, three,", raw=True, options={"num_predict": 8})
        assert answer.response and answer.done_reason == "length"
        (call,) = client.chat(FAR, HELLO, tools=[TOOL]).message.tool_calls or ()
        assert call.function.name == "weather"
        assert [vector[0] for vector in client.embed(VECTORS, ["a", "b"]).embeddings] == [0.5, 1.5]

    def test_what_is_there(self, both: Both, door: Door) -> None:
        client = door.ollama()
        assert {model.model for model in client.list().models} == {both.model, FAR, VECTORS}
        assert client.show(both.model).modelinfo
        with pytest.raises(ollama.ResponseError) as caught:
            client.chat(both.model + "x", HELLO)
        assert caught.value.status_code == 404 and both.model in caught.value.error


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not here; any package manager has it")
class TestCurl:
    def curl(self, door: Door, path: str, body: dict[str, Any]) -> str:
        """Run `curl -N`."""
        headers = [argument for name, value in door.headers.items() for argument in ("-H", f"{name}: {value}")]
        command = ["curl", "-sN", "--max-time", "60", *headers, "-d", json.dumps(body), door.url + path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    def test_events_of_openais_api(self, both: Both, door: Door) -> None:
        body = {"model": both.model, "messages": HELLO, "max_tokens": 8, "stream": True}
        events = self.curl(door, "/v1/chat/completions", body).split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""] and all(event.startswith("data: ") for event in events[:-1])

    def test_lines_of_ollamas_api(self, both: Both, door: Door) -> None:
        body = {"model": both.model, "prompt": "Hello", "options": {"num_predict": 4}}
        lines = [json.loads(line) for line in self.curl(door, "/api/generate", body).splitlines()]
        assert lines[-1]["done"] and not any(line["done"] for line in lines[:-1])


class TestCommands:
    def test_a_model_answers_on_the_terminal(self, both: Both) -> None:
        said = both.installation.hive("model", "chat", FAR, "count").stdout
        assert said.strip() == text_of(TOKENS).strip()
        whole = both.installation.json("model", "chat", both.model, "What is it?", "--max-tokens", "8")
        assert whole["choices"][0]["message"]["content"]

    def test_models_are_listed_and_a_call_is_explained(self, both: Both) -> None:
        assert len(both.installation.json("model", "list")["models"]) == 3
        with both.doors["gateway"].openai() as client:
            raw = client.chat.completions.with_raw_response.create(model=FAR, messages=HELLO)
        assert raw.headers["x-hive-route"] == "pool"
        shown = both.installation.json("model", "explain", raw.headers["x-request-id"])
        assert shown["model"] == FAR and shown["executor"] == raw.headers["x-hive-executor"]
        assert any(one["rejected"] for one in shown["candidates"])


class TestAgents:
    MANIFEST = (
        "apiVersion: hive/v1\nkind: Agent\nname: capital\nversion: 1.0.0\nruntime: python\nentry: agent.py\n"
        "resources: {{timeout: 5m}}\npermissions: {{model: {{names: [{model}], max_tokens: 16}}}}\n"
    )
    AGENT = (
        "from hive import ModelError, model\n"
        "def run(input):\n"
        "    answer = model.chat(input['question'], temperature=0, seed=1)\n"
        "    try:\n"
        "        while True:\n"
        "            model.chat('Go on.', temperature=0, seed=1)\n"
        "    except ModelError as error:\n"
        "        return {'text': answer.text, 'first': answer['usage']['completion_tokens'], 'end': error.code}\n"
    )

    def test_guests_call_models_within_their_tokens(self, both: Both, tmp_path: Path) -> None:
        """On the machine that has the model, or through the router to it: placement decides."""
        installation = both.installation
        (tmp_path / "manifest.yaml").write_text(self.MANIFEST.format(model=both.model))
        (tmp_path / "agent.py").write_text(self.AGENT)
        tried = installation.json("agent", "run", str(tmp_path), "--input", f"question={HELLO[0]['content']}")
        assert tried["output"]["text"] and tried["output"]["end"] == "budget_exhausted"
        installation.hive("agent", "push", str(tmp_path), "--grant")
        task = {"id": "ask", "agent": "capital@1.0.0", "fork": [1, 2, 3], "input": {"question": "Say hello."}}
        document = {"apiVersion": "hive/v1", "kind": "Job", "name": "capital", "models": {"pin": "pool"}}
        job = installation.submit({**document, "tasks": [task], "output": "${tasks.ask.output}"})
        wait_until(lambda: installation.get(f"/v1/jobs/{job}")["state"] == "succeeded", 60, "the job is done")
        outputs = installation.get(f"/v1/jobs/{job}")["output"]
        assert [output["end"] for output in outputs] == ["budget_exhausted"] * 3
        tasks = {one["task_id"] for one in installation.get(f"/v1/jobs/{job}/tasks")["tasks"]}

        def calls() -> list[dict[str, Any]]:
            found = installation.get("/v1/audit/events", limit=1000)["events"]
            finished = [one["payload"] for one in found if one["event"]["type"] == "ModelCallFinished"]
            return [call for call in finished if call.get("job") == job]

        wait_until(lambda: {call["task"] for call in calls()} == tasks, 30, "a call of each task is recorded")
        counted = {task: [call["completion_tokens"] for call in calls() if call["task"] == task] for task in tasks}
        assert sorted(tokens[0] for tokens in counted.values()) == sorted(one["first"] for one in outputs)
        assert all(0 < sum(tokens) <= 16 for tokens in counted.values())
