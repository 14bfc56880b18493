"""Connections to the server of one base URL, kept for the next request, and used by one request at a time.

Sources: RFC 9110 (semantics; section 4.3.4 and RFC 9525: who a server is that speaks TLS), RFC 9112 (section 9:
connections).
"""

import asyncio
import re
import ssl
from collections.abc import Mapping
from typing import Final, Literal
from urllib.parse import quote, urlsplit

from hive_common.inference.http1 import CLOSED_HERE, Connection, Response
from hive_common.kernel.errors import InvalidArgument, Unavailable
from hive_common.ops.tls import client_context

CONNECT_S: Final = 2.0
CONNECT_TLS_S: Final = 5.0
"""With TLS a connection takes two round trips and some computing more, and such servers are further away."""

IDLE_S: Final = 4.0
"""A connection that nothing was asked over for so long is closed, before the server does it: uvicorn, llama.cpp and
Node wait for 5 s. What is sent just when a server closes may not be sent again."""

IDLE_TLS_S: Final = 15.0
"""A new one costs more with TLS, and what stands in front of such servers waits for a minute and longer."""

_NO_HEADERS: Final[dict[str, str]] = {}
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_PATH_SAFE: Final = "/:@!$&'()*+,;=~%"


class Pool:
    """Makes requests to one server.

    Requests are not bounded here: whoever makes them bounds them. Redirects are answers like any other.

    Args:
        url: base URL, `http` or `https`. Over `https` the server has to prove that it is the host that is named.
        headers: shown with every request, such as a key.
        ca_file: certificates in PEM of whom to trust over `https`; empty trusts whom the system trusts.

    Raises:
        InvalidArgument: the URL, a header or the file cannot be used.
    """

    def __init__(self, url: str, headers: Mapping[str, str] = _NO_HEADERS, ca_file: str = "") -> None:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").encode("idna").decode(), parts.port
        except ValueError as error:
            raise InvalidArgument(f"{url}: {error}; expected a base URL such as http://127.0.0.1:11434") from error
        if parts.scheme not in ("http", "https") or not host or parts.query or parts.fragment:
            raise InvalidArgument(f"{url}: expected a base URL such as http://127.0.0.1:11434")
        if parts.username is not None:
            raise InvalidArgument(
                f"{parts.scheme}://…@{host}: a URL is shown and logged; put the key into `key_file`"
            )
        self.url = url
        self._is_tls = parts.scheme == "https"
        self._host = host
        self._port = port or (443 if self._is_tls else 80)
        self._path = quote(parts.path.rstrip("/"), safe=_PATH_SAFE)
        self._tls = _tls(ca_file) if self._is_tls else None
        fixed = {"host": _host_header(host, port), "accept-encoding": "identity", "user-agent": "hive", **headers}
        self._fixed = b" HTTP/1.1\r\n" + _lines(fixed)
        self._idle_s = IDLE_TLS_S if self._is_tls else IDLE_S
        self._idle: dict[Connection, float] = {}
        self._all: set[Connection] = set()
        self._sweeping: asyncio.TimerHandle | None = None
        self._is_closed = False

    async def request(
        self,
        method: Literal["GET", "POST"],
        path: str,
        body: bytes = b"",
        headers: Mapping[str, str] = _NO_HEADERS,
        *,
        repeats: bool = False,
    ) -> Response:
        """Make a request, and return once the head of its answer is there.

        A connection that the server has closed since it was kept is not written to. It may close one just when it
        is used again: then nobody can tell whether the request came there. One that changes nothing there is made
        once more, over a new connection, where not a byte of an answer has come (RFC 9110, section 9.2.2); any
        other fails. Being cancelled closes the connection, by which the server hears of it.

        Args:
            method: whose answers may have a body.
            path: below the base URL.
            body: all of it.
            headers: of this request.
            repeats: it changes nothing there and costs nothing, although it is a POST. A GET always is so.

        Raises:
            InvalidArgument: a header has control characters.
            Unavailable: the server cannot be reached, or what it answers cannot be read. `reached` in its fields is
                False where the request cannot have come there.
        """
        request = b"%b %b%b%b%bcontent-length: %d\r\n\r\n%b" % (
            method.encode(),
            self._path.encode(),
            path.encode(),
            self._fixed,
            _lines(headers),
            len(body),
            body,
        )
        reached = False
        while self._idle:
            # The one that was used last is the least likely to be closed.
            connection, _ = self._idle.popitem()
            if not connection.is_quiet:
                connection.abort(CLOSED_HERE)
                continue
            try:
                return await _begun(connection.send(request))
            except Unavailable:
                if not (repeats or method == "GET") or connection.has_answered or self._is_closed:
                    raise
                reached = True
            break
        return await _begun((await self._connected(reached)).send(request))

    def close(self) -> None:
        """Close all connections. Answers that are on their way break off."""
        self._is_closed = True
        if self._sweeping is not None:
            self._sweeping.cancel()
            self._sweeping = None
        for connection in tuple(self._all):
            connection.abort(CLOSED_HERE)
        self._idle.clear()

    async def _connected(self, reached: bool) -> Connection:
        if self._is_closed:
            raise Unavailable(f"{self.url}: {CLOSED_HERE}", url=self.url, reached=reached)
        within_s = CONNECT_TLS_S if self._is_tls else CONNECT_S
        try:
            async with asyncio.timeout(within_s):
                _, connection = await asyncio.get_running_loop().create_connection(
                    lambda: Connection(self.url, self._freed, self._gone),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=self._host if self._is_tls else None,
                )
        except TimeoutError as error:
            raise self._unreachable(f"no connection within {within_s:g} s", reached) from error
        except ssl.SSLCertVerificationError as error:
            raise self._unreachable(f"its certificate is not trusted: {error.verify_message}", reached) from error
        except OSError as error:
            raise self._unreachable(error.strerror or str(error) or type(error).__name__, reached) from error
        if self._is_closed or not connection.is_open:
            connection.abort(CLOSED_HERE)
            raise self._unreachable(CLOSED_HERE if self._is_closed else "the connection was closed", reached)
        self._all.add(connection)
        return connection

    def _unreachable(self, why: str, reached: bool) -> Unavailable:
        """Return the error. Whoever pays for calls has to know which ones cannot have begun there."""
        return Unavailable(f"{self.url}: cannot be reached: {why}", url=self.url, reached=reached)

    def _freed(self, connection: Connection) -> None:
        if self._is_closed:
            connection.abort(CLOSED_HERE)
            return
        loop = asyncio.get_running_loop()
        self._idle[connection] = loop.time()
        if self._sweeping is None:
            self._sweeping = loop.call_later(self._idle_s, self._sweep)

    def _gone(self, connection: Connection) -> None:
        self._idle.pop(connection, None)
        self._all.discard(connection)

    def _sweep(self) -> None:
        """Close what was idle for too long, and come again when the next one will have been."""
        self._sweeping = None
        loop = asyncio.get_running_loop()
        until_s = loop.time() - self._idle_s
        # In the order in which they became idle.
        for connection, since_s in tuple(self._idle.items()):
            if since_s > until_s:
                self._sweeping = loop.call_at(since_s + self._idle_s, self._sweep)
                break
            del self._idle[connection]
            connection.abort(CLOSED_HERE)


async def _begun(response: Response) -> Response:
    try:
        await response.begun()
    except BaseException:
        response.close()
        raise
    return response


def _tls(ca_file: str) -> ssl.SSLContext:
    context = client_context(ca_file) if ca_file else ssl.create_default_context()
    context.set_alpn_protocols(["http/1.1"])
    return context


def _host_header(host: str, port: int | None) -> str:
    named = f"[{host}]" if ":" in host else host
    return named if port is None else f"{named}:{port}"


def _lines(headers: Mapping[str, str]) -> bytes:
    """Return fields as they stand in a head. Raises InvalidArgument where one could begin another line."""
    for name, value in headers.items():
        if _CONTROLS.search(value) is not None:
            raise InvalidArgument(f"header {name}: holds control characters", path=name)
    return "".join([f"{name}: {value}\r\n" for name, value in headers.items()]).encode()
