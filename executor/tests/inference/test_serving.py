"""The loopback port: both APIs for programs of this machine, whatever else is away."""

import asyncio
import socket

import aiohttp
import msgspec
from hive_common.inference.sse import DONE
from hive_common.ops.ports import free_port
from hive_common.testing.scripted import ScriptedBackEnd, text_of

from .place import Places, until

CHAT = {"model": "scripted", "messages": [{"role": "user", "content": "count for me"}]}


async def up(url: str) -> None:
    async with asyncio.timeout(20), aiohttp.ClientSession() as session:
        while True:
            try:
                async with session.get(f"{url}/v1/models"):
                    return
            except aiohttp.ClientError:
                await asyncio.sleep(0.01)


async def test_programs_of_this_machine_call_models_without_a_key(
    places: Places, scripted: ScriptedBackEnd
) -> None:
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    place = await places.make(scripted.url, models_port=port)
    await up(url)
    async with aiohttp.ClientSession() as session:
        async with session.post(f"{url}/v1/chat/completions", json=CHAT) as answer:
            assert answer.headers["x-hive-route"] == "local"
            assert answer.headers["x-hive-executor"] == place.config.executor_id
            assert msgspec.json.decode(await answer.read())["choices"][0]["message"]["content"] == text_of(16)
        async with session.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": True}) as answer:
            assert (await answer.read()).endswith(DONE)
        async with session.get(f"{url}/api/tags") as answer:
            assert [model["name"] for model in (await answer.json())["models"]] == ["scripted"]
        async with session.post(f"{url}/v1/chat/completions", json={**CHAT, "model": "x"}) as answer:
            assert answer.status == 404
    await until(lambda: len(place.router.reports) == 2)


async def test_a_program_that_goes_ends_the_generation(places: Places, scripted: ScriptedBackEnd) -> None:
    scripted.play(tokens=1_000_000, pace_ms=1)
    port = free_port()
    await places.make(scripted.url, models_port=port)
    url = f"http://127.0.0.1:{port}"
    await up(url)
    for stream in (True, False):
        before = scripted.counts.cancelled
        async with aiohttp.ClientSession() as session:
            asking = asyncio.create_task(
                session.post(f"{url}/v1/chat/completions", json={**CHAT, "stream": stream})
            )
            await scripted.until(lambda: scripted.counts.active == 1)
            asking.cancel()
            await asyncio.wait({asking})
        await scripted.until(lambda before=before: scripted.counts.cancelled == before + 1)


async def test_a_port_that_is_taken_is_told_and_used_once_it_is_free(
    places: Places, scripted: ScriptedBackEnd
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        place = await places.make(scripted.url, models_port=port)
        await until(place.models.problem)
        assert f"127.0.0.1:{port}" in (place.models.problem() or "")
    await up(f"http://127.0.0.1:{port}")
    assert place.models.problem() is None
