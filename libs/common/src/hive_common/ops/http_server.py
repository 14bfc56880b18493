"""How HTTP is served inside of a process: uvicorn under the process's own stop, and a client that goes is told."""

import asyncio
import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Final

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from hive_common.ops.gathering import HeadHeld

KEEP_ALIVE_S: Final = 75

CLIENT: Final = "hive.client"
"""Where a scope carries the `Client` of its connection."""


class Client:
    """Whoever is at the other end of a connection.

    Attributes:
        is_gone: it went away.
        watchers: are called when it goes.
    """

    __slots__ = ("is_gone", "watchers")

    def __init__(self) -> None:
        self.is_gone = False
        self.watchers: set[Callable[[], None]] = set()

    def left(self) -> None:
        """It went away."""
        self.is_gone = True
        for watcher in list(self.watchers):
            watcher()


class Server(uvicorn.Server):
    """Serves an application. `await serve([listener])` ends after `should_exit` was set.

    Args:
        app: answers.
        grace_s: what calls have to their end after `should_exit`.
        cert_file, key_file: of TLS; without it where they are empty.
    """

    def __init__(self, app: Any, grace_s: int, cert_file: str = "", key_file: str = "") -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=_Connection,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=grace_s,
                ssl_certfile=cert_file or None,
                ssl_keyfile=key_file or None,
            )
        )

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals alone: `Stop` has them, and uvicorn would take them away from it."""
        yield


class _Connection(HttpToolsProtocol):
    """A connection that writes heads with bodies, and tells who wants to know when its client goes."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._held = HeadHeld(transport)
        self._client = Client()
        super().connection_made(self._held)

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._client.left()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._held.expect_head()
        self.scope[CLIENT] = self._client  # type: ignore[typeddict-unknown-key]
