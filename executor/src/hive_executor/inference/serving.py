"""The loopback port on which this machine's programs reach all models without a key."""

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import Final

import uvicorn
from hive_common.inference.calls import Completer
from hive_common.inference.exchange import App, Caller
from hive_common.inference.surfaces import loopback_surfaces

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
BACKLOG: Final = 512
TRY_AGAIN_S: Final = 2.0
KEEP_ALIVE_S: Final = 75
GRACE_S: Final = 2


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: `Stop` has them."""
        yield


class LoopbackPort:
    """Serves OpenAI's and Ollama's APIs. A port that is taken is tried again and again: the device works without.

    Args:
        completer: serves the calls.
        owner: pseudonym of the device's owner, whose calls these are.
        port: of 127.0.0.1.
    """

    def __init__(self, completer: Completer, owner: str, port: int) -> None:
        self._app: App = loopback_surfaces(completer, Caller(pseudonym=owner))
        self._port = port
        self.problem: str | None = None
        """One sentence while it does not listen."""

    async def run(self) -> None:
        """Serve for ever. Ends only by being cancelled."""
        listener = await self._listener()
        server = _Server(
            uvicorn.Config(
                self._app,
                http="httptools",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        serving = asyncio.create_task(server.serve([listener]), name="models port")
        try:
            await asyncio.shield(serving)
        finally:
            server.should_exit = True
            await asyncio.wait({serving})

    async def _listener(self) -> socket.socket:
        while True:
            try:
                listener = socket.create_server((HOST, self._port), backlog=BACKLOG)
            except OSError as error:
                self.problem = f"{HOST}:{self._port}: cannot listen for model calls: {error.strerror}"
                log.warning("%s; trying again", self.problem)
                await asyncio.sleep(TRY_AGAIN_S)
            else:
                self.problem = None
                log.info("models answer on http://%s:%d/v1", HOST, self._port)
                return listener
