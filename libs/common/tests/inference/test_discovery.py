"""What serves models tells about them, each kind in its own way."""

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from hive_common.contracts.events import Model
from hive_common.inference.abilities import lacking
from hive_common.inference.backends import BackEnds
from hive_common.inference.discovery import Discovery, base_url
from hive_common.inference.http_pool import Pool
from hive_common.ops.ports import free_port
from hive_common.testing.scripted import ScriptedBackEnd, ScriptedModel

MODELS = (
    ScriptedModel(name="beta:1b", family="llama", size_bytes=7, quantisation="Q4_0", context_tokens=8192),
    ScriptedModel(name="alpha:2b", family="qwen", context_tokens=512, loaded=False, tools=False),
    ScriptedModel(name="vectors", family="bert", embeds=True, loaded=False, tools=False),
)


@contextlib.contextmanager
def looking_at(url: str) -> Iterator[Discovery]:
    pool = Pool(base_url(url))
    try:
        yield Discovery(pool)
    finally:
        pool.close()


async def discovered(url: str) -> tuple[Model, ...] | None:
    with looking_at(url) as discovery:
        return await discovery.models()


async def test_ollama_tells_everything(scripted: ScriptedBackEnd) -> None:
    scripted.play(flavour="ollama", models=MODELS)
    alpha, beta, vectors = await discovered(scripted.url) or ()
    assert beta == Model("beta:1b", "ollama", "llama", 7, "Q4_0", 8192, True, ("completion", "tools"), "0" * 64)
    assert (alpha.context_tokens, alpha.loaded, alpha.abilities) == (512, False, ("completion",))
    assert vectors.abilities == ("embedding",)


async def test_lm_studio_tells_what_is_loaded_and_what_takes_tools(scripted: ScriptedBackEnd) -> None:
    scripted.play(flavour="lm-studio", models=MODELS)
    alpha, beta, vectors = await discovered(scripted.url) or ()
    assert beta == Model("beta:1b", "lm-studio", "llama", 0, "Q4_0", 8192, True, ("completion", "tools"))
    assert not alpha.loaded
    assert vectors.abilities == ("embedding",)


@pytest.mark.parametrize("tools", [True, False])
async def test_llama_cpp_tells_its_context_and_its_template_whether_it_takes_tools(
    scripted: ScriptedBackEnd, tools: bool
) -> None:
    scripted.play(flavour="llama.cpp", models=(ScriptedModel(name="smol", context_tokens=2048, tools=tools),))
    (smol,) = await discovered(scripted.url) or ()
    assert (smol.backend, smol.context_tokens, smol.size_bytes, smol.loaded) == ("llama.cpp", 2048, 1_000_000, True)
    assert lacking(smol, ("tools",)) == ([] if tools else ["tools"])


async def test_vllm_tells_its_context(scripted: ScriptedBackEnd) -> None:
    scripted.play(flavour="vllm", models=MODELS[:1])
    assert await discovered(scripted.url) == (Model("beta:1b", "vllm", context_tokens=8192, loaded=True),)


async def test_any_other_server_of_the_api_tells_names(scripted: ScriptedBackEnd) -> None:
    scripted.play(models=MODELS[:1])
    found = (Model("beta:1b", "openai", loaded=True),)
    assert await discovered(scripted.url) == found
    assert await discovered(f"{scripted.url}/v1/") == found
    assert not lacking(found[0], ("completion", "embedding", "tools"))


async def test_it_is_kept_current_and_a_server_is_not_asked_for_what_it_does_not_have(
    scripted: ScriptedBackEnd,
) -> None:
    scripted.play(models=MODELS[:1])
    with looking_at(scripted.url) as discovery:
        assert [model.name for model in await discovery.models() or ()] == ["beta:1b"]
        scripted.requests.clear()
        scripted.play(models=MODELS[1:2])
        assert [model.name for model in await discovery.models() or ()] == ["alpha:2b"]
        assert [request.path for request in scripted.requests] == ["/v1/models"]
    scripted.play(flavour="ollama")
    with looking_at(scripted.url) as discovery:
        await discovery.models()
        scripted.requests.clear()
        await discovery.models()
        assert [request.path for request in scripted.requests] == ["/api/tags", "/api/ps"]


async def test_a_server_that_is_away_has_none_and_comes_back(scripted: ScriptedBackEnd) -> None:
    assert await discovered(f"http://127.0.0.1:{free_port()}") is None
    async with BackEnds([scripted.url]) as back_ends:
        assert [model.name for model in back_ends.found] == ["scripted"]
        await scripted.stop()
        assert await back_ends.look() == () and not back_ends.all[0].is_up
        await scripted.start()
        assert [model.name for model in await back_ends.look()] == ["scripted"] and back_ends.all[0].is_up


async def test_who_watches_hears_of_models_that_come_and_go_and_of_nothing_else(scripted: ScriptedBackEnd) -> None:
    seen: list[list[str]] = []
    async with BackEnds([scripted.url]) as back_ends:
        watching = asyncio.create_task(
            back_ends.run(1, lambda: seen.append([model.name for model in back_ends.found]))
        )
        looks = scripted.counts.requests
        await scripted.until(lambda: scripted.counts.requests > looks + 3)
        scripted.play(models=(*scripted.script.models, ScriptedModel(name="new")))
        await scripted.until(lambda: bool(seen))
        await scripted.stop()
        async with asyncio.timeout(20):
            while len(seen) < 2:
                await asyncio.sleep(0.01)
        watching.cancel()
        await asyncio.wait({watching})
    assert seen == [["new", "scripted"], []]


@pytest.mark.parametrize(
    ("backend", "abilities", "lacks"),
    [
        ("vllm", (), []),
        ("ollama", ("completion",), ["tools"]),
        ("ollama", ("embedding",), ["completion", "tools"]),
        ("llama.cpp", ("completion", "tools"), []),
        ("lm-studio", ("completion", "tools"), ["embedding"]),
        ("lm-studio", (), []),
    ],
)
def test_what_a_model_lacks_is_known_where_what_serves_it_tells(
    backend: str, abilities: tuple[str, ...], lacks: list[str]
) -> None:
    model = Model(name="m", backend=backend, abilities=abilities)
    assert lacking(model, ("tools", "embedding", "completion")) == lacks
