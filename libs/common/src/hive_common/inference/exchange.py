"""One HTTP exchange of a model surface, as plain ASGI: its body, caller and deadline, and a client that may go.

Nothing stands between the server and the answer here: frameworks take longer to route a call than all of this.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from types import TracebackType
from typing import Any, Final, NamedTuple, Protocol

from hive_common.inference.calls import (
    BODY_BYTES_MAX,
    PIN_ANY,
    Answer,
    Completer,
    Endpoint,
    Head,
    ModelCall,
    narrowed,
)
from hive_common.kernel.errors import DeadlineExceeded, HiveError, InvalidArgument, PayloadTooLarge
from hive_common.kernel.ids import new_id
from hive_common.ops.http_server import CLIENT, Client

log = logging.getLogger(__name__)

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Sequence[tuple[bytes, bytes]]

JSON_TYPE: Final = "application/json"
SSE_TYPE: Final = "text/event-stream"

TIMEOUT_HEADER: Final = b"x-hive-timeout-ms"
PIN_HEADER: Final = b"x-hive-pin"
DEADLINE_MS: Final = 600_000
"""For a call that names no time of its own."""
DEADLINE_MS_MAX: Final = 3_600_000


class Caller(NamedTuple):
    """What whoever serves the surface knows of a caller.

    Attributes:
        pseudonym: the subject of what is recorded.
        key: name of the key that was shown.
        pin: where data may go; a call may only narrow it.
        counts_only: keep no prompt and no completion.
        cloud: calls may go to providers outside, within a budget.
    """

    pseudonym: str = ""
    key: str = ""
    pin: str = PIN_ANY
    counts_only: bool = False
    cloud: bool = False


Callers = Callable[[Scope], Caller]
"""Says who calls, given the ASGI scope. Raises a HiveError where that one may not."""


class Refusal(NamedTuple):
    """An answer that tells an error."""

    status: int
    headers: Headers
    body: bytes
    content_type: str = JSON_TYPE


class Shape(Protocol):
    """How a surface writes the answers of back ends, which all speak OpenAI's language. One for each exchange."""

    stream_type: str

    def whole(self, body: bytes) -> bytes:
        """Return an answer that came in one piece. Raises HiveError where it cannot be read."""
        ...

    def piece(self, events: bytes) -> bytes:
        """Return what follows from whole server-sent events; nothing, where that is nothing yet."""
        ...

    def end(self) -> bytes:
        """Return what is missing once the stream has ended: at least an error, where it ended early."""
        ...

    def refusal(self, error: BaseException) -> Refusal:
        """Return the answer for what went wrong before anything was sent."""
        ...

    def broken(self, error: BaseException) -> bytes:
        """Return the last piece of a stream that broke off; nothing, where it had its end before."""
        ...


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


class WhileConnected:
    """Cancels what runs inside of it when the client goes away.

    Raises ClientGone at its end then.
    """

    def __init__(self, scope: Scope) -> None:
        self._client: Client = scope[CLIENT]
        self._gone = False

    def __enter__(self) -> None:
        if self._client.is_gone:
            raise ClientGone
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._client.watchers.add(self._left)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._client.watchers.discard(self._left)
        # Where somebody else cancelled as well, that one is to be obeyed.
        if self._gone and self._task.uncancel() == 0 and isinstance(error, asyncio.CancelledError):
            raise ClientGone from None

    def _left(self) -> None:
        self._gone = True
        self._task.cancel()


class Exchange:
    """One call of a surface and its answer.

    Attributes:
        id: of the call; every answer carries it as `x-request-id`.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.id = new_id()
        self._scope = scope
        self._receive = receive
        self._send = send
        self._streaming = False

    def header(self, name: bytes) -> str:
        """Return a header of the request, empty without one."""
        for key, value in self._scope["headers"]:
            if key == name:
                return str(value, "latin-1")
        return ""

    async def body(self) -> bytes:
        """Return the body of the request.

        Raises:
            PayloadTooLarge: more than `BODY_BYTES_MAX`; no more than that was read.
            ClientGone: it went away before the end of the body.
        """
        declared = self.header(b"content-length")
        size = int(declared) if declared.isdecimal() else 0
        parts: list[bytes] = []
        while size <= BODY_BYTES_MAX:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            parts.append(message.get("body", b""))
            if not message.get("more_body", False):
                return parts[0] if len(parts) == 1 else b"".join(parts)
            size = sum(map(len, parts))
        raise PayloadTooLarge(f"body: at most {BODY_BYTES_MAX} bytes are taken here", limit_bytes=BODY_BYTES_MAX)

    def call(self, caller: Caller, endpoint: Endpoint, model: str, body: bytes, stream: bool) -> ModelCall:
        """Return the call that the request asks for.

        Raises:
            InvalidArgument: a header has no value of its kind.
            PermissionDenied: it asks for a wider pin than the caller's.
        """
        return ModelCall(
            id=self.id,
            endpoint=endpoint,
            model=model,
            body=body,
            stream=stream,
            deadline_ms=self._deadline_ms(),
            caller=caller.pseudonym,
            key=caller.key,
            pin=narrowed(caller.pin, self.header(PIN_HEADER)),
            counts_only=caller.counts_only,
            cloud=caller.cloud,
        )

    def _deadline_ms(self) -> int:
        text = self.header(TIMEOUT_HEADER)
        if not text:
            return DEADLINE_MS
        if not text.isdecimal() or not 1 <= int(text) <= DEADLINE_MS_MAX:
            raise InvalidArgument(
                f"X-Hive-Timeout-Ms: got {text[:20]!r}; expected 1 to {DEADLINE_MS_MAX} milliseconds",
                path="X-Hive-Timeout-Ms",
            )
        return int(text)

    async def complete(self, completer: Completer, call: ModelCall, shape: Shape) -> None:
        """Make the call and send its answer, or what went wrong.

        Raises:
            ClientGone: the client went away; what it had asked for was cancelled.
        """
        with WhileConnected(self._scope):
            try:
                async with asyncio.timeout(call.deadline_ms / 1000):
                    answer = await completer.complete(call)
                    await (self._stream if call.stream else self._whole)(answer, shape)
            except TimeoutError:
                await self.fail(DeadlineExceeded(f"no whole answer within {call.deadline_ms} ms"), shape)
            except Exception as error:  # noqa: BLE001 - whatever is raised becomes an answer
                await self.fail(error, shape)

    async def _stream(self, answer: Answer, shape: Shape) -> None:
        chunks = answer.chunks
        try:
            # Its first chunk is awaited before anything is sent: from then on the generator cleans up after itself.
            chunk = await anext(chunks, b"")
            if not answer.head.content_type.startswith(SSE_TYPE):
                await self._send_rest(answer.head, [chunk, *[part async for part in chunks]], shape)
                return
            headers = [
                (b"content-type", shape.stream_type.encode()),
                (b"cache-control", b"no-cache"),
                (b"x-accel-buffering", b"no"),
            ]
            self._streaming = True
            await self._start(answer.head.status, [*headers, *self._route(answer.head)])
            await self._piece(shape.piece(chunk))
            async for chunk in chunks:
                await self._piece(shape.piece(chunk))
            await self._send({"type": "http.response.body", "body": shape.end(), "more_body": False})
        finally:
            await chunks.aclose()

    async def _whole(self, answer: Answer, shape: Shape) -> None:
        chunks = answer.chunks
        try:
            parts = [part async for part in chunks]
        finally:
            await chunks.aclose()
        await self._send_rest(answer.head, parts, shape)

    async def _send_rest(self, head: Head, parts: list[bytes], shape: Shape) -> None:
        body = shape.whole(parts[0] if len(parts) == 1 else b"".join(parts))
        await self.send(head.status, body, head.content_type or JSON_TYPE, self._route(head))

    async def _piece(self, data: bytes) -> None:
        if data:
            await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def fail(self, error: BaseException, shape: Shape) -> None:
        """Tell an error: as the answer, or as the end of a stream that has begun."""
        if not isinstance(error, HiveError):
            log.error("model call %s failed", self.id, exc_info=error)
        if self._streaming:
            await self._send({"type": "http.response.body", "body": shape.broken(error), "more_body": False})
            return
        told = shape.refusal(error)
        await self.send(told.status, told.body, told.content_type, told.headers)

    async def send(self, status: int, body: bytes, content_type: str = JSON_TYPE, headers: Headers = ()) -> None:
        """Send a whole answer."""
        named = [(b"content-type", content_type.encode()), (b"content-length", b"%d" % len(body))]
        await self._start(status, [*named, *headers])
        await self._send({"type": "http.response.body", "body": b"" if self._is_head() else body})

    async def _start(self, status: int, headers: list[tuple[bytes, bytes]]) -> None:
        headers.append((b"x-request-id", self.id.encode()))
        await self._send({"type": "http.response.start", "status": status, "headers": headers})

    def _is_head(self) -> bool:
        return bool(self._scope["method"] == "HEAD")

    @staticmethod
    def _route(head: Head) -> list[tuple[bytes, bytes]]:
        return [(b"x-hive-route", head.route.encode()), (b"x-hive-executor", head.executor.encode())]
