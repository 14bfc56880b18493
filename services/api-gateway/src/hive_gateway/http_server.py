"""The HTTP server, inside this process and under its own stop."""

import asyncio
import socket

from hive_common.kernel.errors import FailedPrecondition
from hive_common.ops.http_server import Server
from starlette.types import ASGIApp

from hive_gateway.settings import KeyPair

BACKLOG = 2048
GRACE_S = 3


class HttpServer:
    """Listens on one address. `port` may be 0; `start` says which one it became.

    Args:
        app: what answers.
        host: address to bind.
        port: port to bind.
        tls: of the listener; None listens without.
    """

    def __init__(self, app: ASGIApp, host: str, port: int, tls: KeyPair | None = None) -> None:
        self._host = host
        self._port = port
        self._server = Server(app, GRACE_S, *((tls.cert_file, tls.key_file) if tls else ()))
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> int:
        """Listen and return the port. Raises FailedPrecondition when it is taken."""
        listener = _listen(self._host, self._port)
        self.task = asyncio.create_task(self._server.serve([listener]), name="http server")
        while not self._server.started:
            if self.task.done():
                self.task.result()
            await asyncio.sleep(0.005)
        port: int = listener.getsockname()[1]
        return port

    async def stop(self) -> None:
        """Take no more calls, give the others a moment, then cut them."""
        self._server.should_exit = True
        if self.task is not None:
            await self.task


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        raise FailedPrecondition(
            f"{host}:{port}: cannot listen for HTTP: {error.strerror}; expected a free port", port=port
        ) from error
