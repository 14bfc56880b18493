"""HTTP/1.1 for one server that has to be cheap: requests are cut from bytes, answers are written whole."""

import asyncio
from collections import deque
from typing import Final, cast

from hive_common.testing.scripted.script import Request

HEAD_BYTES_MAX: Final = 64 << 10
_REASONS: Final = {200: b"OK", 400: b"Bad Request", 401: b"Unauthorized", 404: b"Not Found"}


class Connection(asyncio.Protocol):
    """One connection. Requests that come before the answer to the last one is done wait their turn."""

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self._buffer = bytearray()
        self._waiting: deque[Request] = deque()
        self._is_answering = False
        self._is_chunked = False
        self._was_asked_to_go_on = False

    def took(self, request: Request) -> None:
        """Answer a request, and call `answered` when that is done."""
        raise NotImplementedError

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        """Cut requests."""
        self._buffer += data
        while (request := self._cut()) is not None:
            self._waiting.append(request)
        self._next()

    def answered(self) -> None:
        """Go on with what has come meanwhile."""
        self._is_answering = False
        self._next()

    def _next(self) -> None:
        while self._waiting and not self._is_answering:
            self._is_answering = True
            self.took(self._waiting.popleft())

    def write(self, data: bytes) -> None:
        """Send bytes."""
        assert self.transport is not None
        self.transport.write(data)

    def answer(self, status: int, body: bytes, headers: bytes = b"", kind: bytes = b"application/json") -> None:
        """Send a whole answer."""
        reason = _REASONS.get(status, b"Scripted")
        self.write(
            b"HTTP/1.1 %d %b\r\ncontent-type: %b\r\ncontent-length: %d\r\n%b\r\n%b"
            % (status, reason, kind, len(body), headers, body)
        )
        self.answered()

    def begin_stream(self) -> None:
        """Send the head of a stream; its pieces are `chunk`s, its end is LAST_CHUNK."""
        self.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n")

    def drop(self) -> None:
        """Cut the connection."""
        assert self.transport is not None
        self.transport.abort()

    def _cut(self) -> Request | None:
        end = self._buffer.find(b"\r\n\r\n")
        if end < 0:
            if len(self._buffer) > HEAD_BYTES_MAX:
                self.drop()
            return None
        first, *lines = self._buffer[:end].decode("latin-1").split("\r\n")
        method, path, _ = first.split(" ", 2)
        headers = {}
        for line in lines:
            name, _, value = line.partition(":")
            headers[name.lower()] = value.strip()
        start = end + 4
        cut = (
            _dechunked(self._buffer, start)
            if headers.get("transfer-encoding", "").lower() == "chunked"
            else self._sized(start, int(headers.get("content-length", 0)))
        )
        if cut is None:
            if headers.get("expect") and not self._was_asked_to_go_on:
                self._was_asked_to_go_on = True
                self.write(b"HTTP/1.1 100 Continue\r\n\r\n")
            return None
        self._was_asked_to_go_on = False
        body, stop = cut
        del self._buffer[:stop]
        return Request(method, path.partition("?")[0], headers, body)

    def _sized(self, start: int, size: int) -> tuple[bytes, int] | None:
        stop = start + size
        return (bytes(self._buffer[start:stop]), stop) if len(self._buffer) >= stop else None


def _dechunked(buffer: bytearray, start: int) -> tuple[bytes, int] | None:
    body = bytearray()
    while (line := buffer.find(b"\r\n", start)) >= 0:
        size = int(bytes(buffer[start:line]).split(b";")[0], 16)
        stop = line + 2 + size
        if len(buffer) < stop + 2:
            return None
        body += buffer[line + 2 : stop]
        start = stop + 2
        if size == 0:
            return bytes(body), start
    return None


def chunk(data: bytes) -> bytes:
    """Return one piece of a stream as it goes over the wire."""
    return b"%x\r\n%b\r\n" % (len(data), data)


LAST_CHUNK: Final = b"0\r\n\r\n"
