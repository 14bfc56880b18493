"""The loopback port on which this machine's programs reach all models without a key."""

import asyncio
import logging
import socket
from typing import Final

from hive_common.inference.calls import Completer
from hive_common.inference.exchange import App, Caller
from hive_common.inference.surfaces import loopback_surfaces
from hive_common.ops.http_server import Server

log = logging.getLogger(__name__)

HOST: Final = "127.0.0.1"
BACKLOG: Final = 512
TRY_AGAIN_S: Final = 2.0
GRACE_S: Final = 2


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
        server = Server(self._app, GRACE_S)
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
