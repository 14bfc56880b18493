"""Both surfaces on a port, over a scripted back end."""

import contextlib
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest
from hive_common.inference.backends import BackEnds
from hive_common.inference.exchange import App, Caller
from hive_common.inference.surfaces import loopback_surfaces
from hive_common.ops.http_server import Server
from hive_common.testing.scripted import Script, ScriptedBackEnd, ScriptedModel

CHAT = ScriptedModel(name="scripted")
VECTORS = ScriptedModel(name="vectors:latest", embeds=True)


@dataclass
class World:
    """What a test of the surfaces needs."""

    url: str
    back_end: ScriptedBackEnd


@contextlib.asynccontextmanager
async def served(app: App) -> AsyncIterator[str]:
    """Serve an application; its base URL."""
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(app, grace_s=1)
    # Without `serve`, which looks for signals every 100 ms, and ends no sooner.
    config = server.config
    config.load()
    server.lifespan = config.lifespan_class(config)
    await server.startup(sockets=[listener])
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.force_exit = True
        await server.shutdown(sockets=[listener])


@pytest.fixture
async def world() -> AsyncIterator[World]:
    """Surfaces over a back end of Ollama's kind, without anything between."""
    script = Script(flavour="ollama", models=(CHAT, VECTORS), tokens=5)
    async with ScriptedBackEnd(script) as back_end, BackEnds([back_end.url]) as back_ends:
        caller = Caller(pseudonym="somebody", pin="pool")
        async with served(loopback_surfaces(back_ends, caller)) as url:
            yield World(url, back_end)
