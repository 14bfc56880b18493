"""Answers that go on: server-sent events (WHATWG HTML, section 9.2) and JSON lines."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterator
from typing import Any, TypeVar

import msgspec
from hive_common.kernel.errors import RateLimited, body_of
from prometheus_client import Gauge
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hive_gateway.problems import problem_of
from hive_gateway.upstream import disconnected

log = logging.getLogger(__name__)
T = TypeVar("T")

SSE_TYPE = "text/event-stream"
NDJSON_TYPE = "application/x-ndjson"
DONE = b"data: [DONE]\n\n"
HEARTBEAT = b": heartbeat\n\n"
STOPPING = b": the gateway stops; connect again with Last-Event-ID\n\n"
RECONNECT = b"retry: 1000\n\n"

HEARTBEAT_S = 10.0
FOLLOWERS_MAX = 512
"""Streams of events that this process holds open at once; each holds a call to the scheduler."""

_encode = msgspec.json.Encoder(enc_hook=str).encode
_FOLLOWERS = Gauge("hive_gateway_streams", "Open streams of server-sent events")


def frame(event: str, data: Any, event_id: str = "") -> bytes:
    """Return one server-sent event. The JSON of `data` MUST NOT hold line breaks."""
    head = f"id: {event_id}\nevent: {event}\ndata: " if event_id else f"event: {event}\ndata: "
    return head.encode() + _encode(data) + b"\n\n"


class Followers:
    """The open event streams of this process: a bound on them, and their end when the process stops."""

    def __init__(self, heartbeat_s: float = HEARTBEAT_S, followers_max: int = FOLLOWERS_MAX) -> None:
        self.stopping = asyncio.Event()
        self.heartbeat_s = heartbeat_s
        self._followers_max = followers_max
        self._open = 0

    def require_room(self) -> None:
        """Raise RateLimited when as many streams are open as this process holds."""
        if self._open >= self._followers_max:
            raise RateLimited(f"{self._open} streams are open here, no more are taken", limit=self._followers_max)

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        """Count a stream as open while the block runs."""
        self._open += 1
        _FOLLOWERS.inc()
        try:
            yield
        finally:
            self._open -= 1
            _FOLLOWERS.dec()


class EventStream(Response):
    """Sends frames, and heartbeats in between, until the source ends, the client goes or the process stops.

    Where the source fails, the last frame is an `error` event with a problem document, and no `[DONE]` follows.
    """

    media_type = SSE_TYPE

    def __init__(self, source: AsyncGenerator[bytes, None], followers: Followers) -> None:
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._source = source
        self._followers = followers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI call."""
        ends = [
            asyncio.create_task(disconnected(receive)),
            asyncio.create_task(self._followers.stopping.wait()),
        ]
        try:
            with self._followers.counted():
                await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                await _part(send, RECONNECT)
                await self._pump(send, *ends)
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            for task in ends:
                task.cancel()
            await asyncio.gather(*ends, return_exceptions=True)

    async def _pump(self, send: Send, gone: asyncio.Task[Any], stopping: asyncio.Task[Any]) -> None:
        upcoming = asyncio.ensure_future(_next(self._source))
        try:
            while True:
                done, _ = await asyncio.wait(
                    {upcoming, gone, stopping},
                    timeout=self._followers.heartbeat_s,
                    return_when=asyncio.FIRST_COMPLETED,
                )
                if gone in done:
                    return
                if stopping in done:
                    await _part(send, STOPPING)
                    return
                if not done:
                    await _part(send, HEARTBEAT)
                    continue
                item = upcoming.result()
                if item is None:
                    return
                await _part(send, item)
                upcoming = asyncio.ensure_future(_next(self._source))
        finally:
            upcoming.cancel()
            await asyncio.gather(upcoming, return_exceptions=True)
            await self._source.aclose()


async def _part(send: Send, data: bytes) -> None:
    await send({"type": "http.response.body", "body": data, "more_body": True})


async def _next(source: AsyncGenerator[bytes, None]) -> bytes | None:
    try:
        return await anext(source, None)
    except Exception as error:
        # The status was sent long ago; all that is left is to say it in the stream.
        if body_of(error).code == "internal":
            log.exception("an event stream failed")
        return frame("error", problem_of(body_of(error)))


async def primed(source: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Wait for the first item, so that an error still becomes a status, and return the whole stream."""
    missing = object()
    first: Any = await anext(source, missing)

    async def everything() -> AsyncGenerator[T, None]:
        async with contextlib.aclosing(source):
            if first is not missing:
                yield first
                async for item in source:
                    yield item

    return everything()


def lines(source: AsyncGenerator[bytes, None], filename: str = "") -> Response:
    """Return an answer of JSON lines. Where `source` fails the connection is cut, not ended."""
    headers = {"Cache-Control": "no-store"}
    if filename:
        headers["Content-Disposition"] = f'attachment; filename="{filename}"'
    return StreamingResponse(source, headers=headers, media_type=NDJSON_TYPE)
