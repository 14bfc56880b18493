"""One connection of an HTTP/1.1 client: a request is written whole, its answer is cut from bytes as they come.

It speaks to back ends, which may be anything: what comes is bounded, and what does not fit is refused, as RFC 9110
(semantics) and RFC 9112 (messages and connections) have it. llhttp parses, and is strict. What is never sent here
(HEAD, CONNECT, Upgrade, TE, a range) need not be understood in an answer either. `http_pool` has the connections.
"""

import asyncio
import select
from collections.abc import Callable
from typing import Final, cast

import httptools

from hive_common.kernel.errors import Unavailable

HEAD_BYTES_MAX: Final = 64 << 10
"""Of all that is no body: the head of an answer with the interim ones before it, and extensions and trailers."""

BUFFER_BYTES_MAX: Final = 64 << 10
"""Of a body that nobody has read yet. Beyond it the connection is left alone; the read that went beyond may have
brought some 256 KiB more, and over TLS twice that."""

_FRAMING: Final = frozenset({"content-length", "transfer-encoding"})
"""Fields that tell where a body ends; without them the end of the connection does."""

LEAVE_S: Final = 1.0
"""An answer may end before its body does, as a stream of events does; what is left may take so long."""

CLOSED_HERE: Final = "it was closed here"
_TOO_LARGE: Final = f"more than {HEAD_BYTES_MAX} bytes that are no body"
_UPGRADED: Final = "it changed to another protocol, which nobody had asked for"


class Response:
    """The answer to one request. Whoever has it MUST read it to its end, or `close` it.

    Args:
        url: of the server, for messages.
        connection: that it comes over.

    Attributes:
        status: of the final answer, once `begun`.
        headers: with names in lower case; fields that came several times are joined (RFC 9110, section 5.3).
    """

    __slots__ = ("_connection", "_fault", "_is_whole", "_pieces", "_size", "_url", "_waiter", "headers", "status")

    def __init__(self, url: str, connection: "Connection") -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self._url = url
        self._connection: Connection | None = connection
        self._pieces: list[bytes] = []
        self._size = 0
        self._is_whole = False
        self._fault = ""
        self._waiter: asyncio.Future[None] | None = None

    @property
    def content_type(self) -> str:
        """The media type in lower case, without parameters; empty where it is not told."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    @property
    def coding(self) -> str:
        """How its body is coded, although `identity` was asked for; empty where it is not."""
        coding = self.headers.get("content-encoding", "").strip().lower()
        return "" if coding == "identity" else coding

    async def begun(self) -> None:
        """Wait for the head.

        Raises:
            Unavailable: there will be none that can be read.
        """
        while not self.status:
            if self._fault:
                raise Unavailable(f"{self._url}: {self._fault}", url=self._url)
            await self._more()

    async def read(self, until_s: float | None = None) -> bytes:
        """Return what has come of the body since the last time, and wait where that is nothing; b"" is its end.

        Args:
            until_s: how long to wait, on the loop's clock.

        Raises:
            Unavailable: it broke off. What had come before was returned before.
            TimeoutError: nothing came until then.
        """
        while not self._pieces:
            if self._is_whole:
                return b""
            if self._fault:
                raise Unavailable(f"{self._url}: the answer broke off: {self._fault}", url=self._url)
            await self._more(until_s)
        pieces, self._pieces, self._size = self._pieces, [], 0
        if self._connection is not None:
            self._connection.drained()
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """Let go of it. Unless all of it has come, that closes the connection, by which the server hears of it."""
        if self._connection is not None:
            self._connection.abort(CLOSED_HERE)
        self._pieces.clear()

    def leave(self) -> None:
        """Let go of it when all that matters has come: what is left comes unread, and the connection is kept."""
        if self._connection is not None:
            self._connection.leave()
        self._pieces.clear()

    async def _more(self, until_s: float | None = None) -> None:
        loop = asyncio.get_running_loop()
        waiter = self._waiter = loop.create_future()
        # For each token of a stream; `asyncio.timeout` costs as much as all the rest of it.
        timer = None if until_s is None else loop.call_at(until_s, _expire, waiter)
        try:
            await waiter
        finally:
            self._waiter = None
            if timer is not None:
                timer.cancel()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # What follows is for its connection.

    def begins(self, status: int, headers: dict[str, str]) -> None:
        """Take the head."""
        self.status, self.headers = status, headers
        self._wake()

    def takes(self, piece: bytes) -> bool:
        """Take a piece of the body; say whether no more should come for now."""
        self._pieces.append(piece)
        self._size += len(piece)
        self._wake()
        return self._size > BUFFER_BYTES_MAX

    def ends(self) -> None:
        """Note that all of it has come."""
        self._is_whole, self._connection = True, None
        self._wake()

    def broke(self, fault: str) -> None:
        """Note that no more will come of it."""
        self._fault, self._connection = self._fault or fault, None
        self._wake()


def _expire(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_exception(TimeoutError())


class Connection(asyncio.Protocol):
    """One connection, for one request after the other.

    Args:
        url: of the server, for messages.
        freed: is told when an answer was whole and the connection can carry the next request.
        gone: is told once when it is closed.

    Attributes:
        has_answered: something has come since the last request.
    """

    def __init__(
        self, url: str, freed: Callable[["Connection"], None], gone: Callable[["Connection"], None]
    ) -> None:
        self._url = url
        self._freed = freed
        self._gone = gone
        self._parser = httptools.HttpResponseParser(self)
        self._transport: asyncio.Transport | None = None
        self._arrivals = select.poll()
        self._response: Response | None = None
        self._leaving: asyncio.TimerHandle | None = None
        self._is_paused = False
        self.has_answered = False
        self._reset()

    def _reset(self) -> None:
        self._headers: dict[str, str] = {}
        self._head_bytes = self._bare_bytes = 0
        self._has_head = self._is_whole = self._has_more = self._keeps = False
        self._fault = ""

    @property
    def is_open(self) -> bool:
        """Whether a request may be sent."""
        return self._transport is not None and not self._transport.is_closing()

    @property
    def is_quiet(self) -> bool:
        """Whether it is open and nothing has come over it unasked, of which its end is the most likely.

        Asks the system: what came since the loop looked last, the loop does not know yet.
        """
        return self.is_open and not self._arrivals.poll(0)

    def send(self, request: bytes) -> Response:
        """Write a request, and return what will be its answer. Nothing may run on this connection."""
        assert self._transport is not None and self._response is None
        response = self._response = Response(self._url, self)
        self.has_answered = False
        self._transport.write(request)
        return response

    def abort(self, fault: str) -> None:
        """Close it at once. `fault` is why the answer that was on its way breaks off."""
        response, self._response = self._response, None
        if self._transport is not None:
            self._transport.abort()
        if response is not None:
            response.broke(fault)

    def leave(self) -> None:
        """Close it soon, unless the answer comes to its end before."""
        if self._leaving is None:
            self._leaving = asyncio.get_running_loop().call_later(LEAVE_S, self.abort, CLOSED_HERE)

    def _stay(self) -> None:
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def drained(self) -> None:
        """Go on reading; what had come was taken."""
        if self._is_paused and self.is_open:
            assert self._transport is not None
            self._is_paused = False
            self._transport.resume_reading()

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take the transport."""
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it
        if (made := transport.get_extra_info("socket")) is not None:
            self._arrivals.register(made.fileno(), select.POLLIN)

    def data_received(self, data: bytes) -> None:
        """Cut the answer."""
        if self._response is None:
            # It answers nothing that was asked; what it would answer next could be taken for something else.
            self.abort("")
            return
        self.has_answered = True
        self._bare_bytes += len(data)
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fault = self._fault or f"what it answered is not HTTP/1.1: {error}"
        except httptools.HttpParserUpgrade:
            self._fault = _UPGRADED
        if self._is_whole:
            self._finish()
        elif self._fault:
            self.abort(self._fault)
        elif self._bare_bytes > HEAD_BYTES_MAX:
            self.abort(_TOO_LARGE)

    def connection_lost(self, exc: Exception | None) -> None:
        """Note the end: of the answer too, where that is how its end is told (RFC 9112, section 6.3)."""
        self._stay()
        response, self._response = self._response, None
        if response is not None:
            if exc is None and self._has_head and not self._headers.keys() & _FRAMING:
                response.ends()
            else:
                why = "" if exc is None else f": {getattr(exc, 'strerror', None) or exc or type(exc).__name__}"
                response.broke(f"the connection was closed{why}")
        self._gone(self)

    def _finish(self) -> None:
        """Give the answer and the connection back.

        What comes behind an answer is no answer to what will be asked next, and a server that answered before it
        had read all of the request may read the rest as the next one.
        """
        self._stay()
        response, self._response = self._response, None
        assert response is not None and self._transport is not None
        response.ends()
        is_clean = self._keeps and not self._has_more and not self._fault
        if not is_clean or self._transport.is_closing() or self._transport.get_write_buffer_size():
            self.abort("")
            return
        self.drained()
        self._reset()
        self._freed(self)

    # httptools.HttpResponseParser

    def on_message_begin(self) -> None:
        """Notice an answer behind the one that was asked for."""
        self._has_more = self._is_whole

    def on_header(self, name: bytes, value: bytes) -> None:
        """Take a field of the head. Trailers are nothing that anybody here asked for."""
        self._head_bytes += len(name) + len(value)
        if self._head_bytes > HEAD_BYTES_MAX:
            self._fault = _TOO_LARGE
        elif not self._has_head:
            key, text = name.decode("latin-1").lower(), value.decode("latin-1").strip(" \t")
            known = self._headers.get(key)
            self._headers[key] = text if known is None else f"{known}, {text}"

    def on_headers_complete(self) -> None:
        """Begin the answer. Interim ones come before it (RFC 9110, section 15.2) and tell nothing."""
        response = self._response
        if self._is_whole or response is None:
            return
        status = self._parser.get_status_code()
        if status < 200:
            self._headers = {}
            if status == 101:
                self._fault = _UPGRADED
            elif status < 100:
                self._fault = f"what it answered is not HTTP/1.1: status {status}"
            return
        coding = self._headers.get("transfer-encoding", "chunked").strip().lower()
        if coding != "chunked":
            self._fault = f"its answer is coded for transfer as {coding[:80]}, which nobody had asked for"
        if self._fault:
            return
        self._has_head = True
        self._keeps = self._parser.should_keep_alive()
        response.begins(status, self._headers)

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body on."""
        if self._response is None or self._is_whole or self._fault:
            return
        self._bare_bytes = 0
        if self._response.takes(body) and not self._is_paused and self.is_open:
            assert self._transport is not None
            self._is_paused = True
            self._transport.pause_reading()

    def on_message_complete(self) -> None:
        """Note the end of the answer."""
        self._is_whole = self._has_head
