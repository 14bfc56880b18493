"""Calls to the router on one connection: a call of gRPC for each takes longer than all else."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import msgspec
from hive_common.inference.calls import Head
from hive_common.kernel.errors import ErrorBody, HiveError, Internal
from hive_common.rpc.frames import Frames
from hive_proto.models.v1 import models_pb2, models_pb2_grpc
from hive_proto.models.v1.models_pb2 import CompleteRequest, ExchangeRequest, ExchangeResponse

from hive_gateway.peers import UNARY_S, Peer

GRANT_BYTES: Final = 64 * 1024
"""Of a stream that were read since the last grant; the router is told then that it may send as many more."""

CONNECT_S: Final = 5.0

_decode_error = msgspec.json.Decoder(ErrorBody).decode


class Incoming(AsyncGenerator[bytes, None]):
    """The answer to one call, as it comes; its `chunks`, once `begun`.

    A class, since a generator function that was never begun would run no `finally`.

    Args:
        call_id: of the call.
        is_stream: it is read piece by piece, and no more comes than is read.
        send: sends to the router.
        left: is called once, when nothing more is wanted of it.
    """

    __slots__ = (
        "_call_id",
        "_chunks",
        "_error",
        "_head",
        "_is_over",
        "_is_stream",
        "_left",
        "_read",
        "_send",
        "_wake",
    )

    def __init__(
        self,
        call_id: str,
        is_stream: bool,
        send: Callable[[ExchangeRequest], None],
        left: Callable[[str], None],
    ) -> None:
        self._call_id = call_id
        self._is_stream = is_stream
        self._send = send
        self._left = left
        self._chunks: list[bytes] = []
        self._read = 0
        self._head: Head | None = None
        self._error: HiveError | None = None
        self._is_over = False
        self._wake: asyncio.Future[None] | None = None

    def take(self, message: ExchangeResponse) -> None:
        """Take what came."""
        if message.error_json:
            return self.fail(_decode_error(message.error_json).raised())
        chunk = message.chunk
        if self._head is None and message.HasField("head"):
            head = message.head
            self._head = Head(head.status, head.content_type, head.route, head.executor)
            chunk = head.chunk
        if chunk:
            self._chunks.append(chunk)
        self._is_over = message.last
        if message.last or self._is_stream:
            self._woken()

    def fail(self, error: HiveError) -> None:
        """End with an error."""
        self._error, self._is_over = error, True
        self._woken()

    async def begun(self) -> Head:
        """Return once there is something to read: of an answer that is no stream, all of it.

        Raises:
            HiveError: what the router says, or became of it.
        """
        try:
            while not (self._is_over or (self._is_stream and self._head is not None)):
                await self._more()
            if self._head is not None and (self._is_stream or self._error is None):
                return self._head
            raise self._error or Internal("the router ended a call without an answer")
        except BaseException:
            await self.aclose()
            raise

    async def asend(self, value: None, /) -> bytes:
        """Return all that has come since the last time. Raises a HiveError where it broke off."""
        while not self._chunks:
            if self._is_over:
                await self.aclose()
                raise self._error or StopAsyncIteration
            try:
                await self._more()
            except BaseException:
                await self.aclose()
                raise
        chunks, self._chunks = self._chunks, []
        data = chunks[0] if len(chunks) == 1 else b"".join(chunks)
        self._grant(len(data))
        return data

    async def athrow(self, *exception: Any) -> bytes:
        """End it with an exception."""
        await self.aclose()
        raise exception[1] if len(exception) > 1 and exception[1] is not None else exception[0]

    async def aclose(self) -> None:
        """Let go of it: what still runs is cancelled."""
        if not self._is_over:
            self._is_over = True
            self._send(ExchangeRequest(cancel=self._call_id))
        self._left(self._call_id)

    async def _more(self) -> None:
        self._wake = asyncio.get_running_loop().create_future()
        await self._wake

    def _woken(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)

    def _grant(self, amount: int) -> None:
        self._read += amount
        if self._is_stream and self._read >= GRANT_BYTES and not self._is_over:
            self._send(ExchangeRequest(grant=self._call_id, grant_bytes=self._read))
            self._read = 0


class _Line:
    """One connection, and the calls that have no answer yet."""

    def __init__(self, router: Peer) -> None:
        self._router = router
        self.calls: dict[str, Incoming] = {}
        self.frames = Frames(ExchangeResponse.FromString, self._took, self._lost)

    def begin(self, call: CompleteRequest, deadline_ms: int) -> Incoming:
        """Send a call. Raises Unavailable where the connection has ended."""
        if not self.frames.is_open:
            # Nobody would ever end what is begun now.
            raise self._router.unreachable()
        incoming = Incoming(call.call_id, call.stream, self.frames.send, self._left)
        self.calls[call.call_id] = incoming
        self.frames.send(ExchangeRequest(call=call, deadline_ms=deadline_ms))
        return incoming

    def _left(self, call_id: str) -> None:
        self.calls.pop(call_id, None)

    def _took(self, message: ExchangeResponse) -> None:
        if (incoming := self.calls.get(message.call_id)) is not None:
            incoming.take(message)

    def _lost(self) -> None:
        calls, self.calls = self.calls, {}
        for incoming in calls.values():
            incoming.fail(self._router.unreachable())


class Exchange:
    """The way to the router. The connection is opened by a call that needs it, and after it broke by the next one.

    Args:
        router: who answers.
    """

    def __init__(self, router: Peer) -> None:
        self._router = router
        self._stub = models_pb2_grpc.ExchangeStub(router.channel)
        self._line: _Line | None = None
        self._opening: asyncio.Task[_Line] | None = None

    async def begin(self, call: CompleteRequest, deadline_ms: int) -> tuple[Head, Incoming]:
        """Make a call; its head, and its body. Being cancelled, or closing the body, cancels it at the router.

        Raises:
            HiveError: what the router says, or that it cannot be reached.
        """
        line = self._line
        if line is None or not line.frames.is_open:
            line = await self._opened()
        incoming = line.begin(call, deadline_ms)
        return await incoming.begun(), incoming

    async def close(self) -> None:
        """End the connection, and what waits on it."""
        if self._opening is not None:
            self._opening.cancel()
            await asyncio.wait({self._opening})
        if self._line is not None:
            self._line.frames.abort()

    async def _opened(self) -> _Line:
        if self._opening is None or self._opening.done():
            self._opening = asyncio.create_task(self._open(), name="connection for calls of models")
        # Whoever waits may go; the others still want it.
        return await asyncio.shield(self._opening)

    async def _open(self) -> _Line:
        opened = await self._router.ask(self._stub.Open, models_pb2.OpenRequest(), None, UNARY_S)
        line = _Line(self._router)
        try:
            async with asyncio.timeout(CONNECT_S):
                await asyncio.get_running_loop().create_connection(
                    lambda: line.frames, self._router.host, opened.port
                )
        except OSError as error:  # TimeoutError is one
            raise self._router.unreachable() from error
        line.frames.send(ExchangeRequest(ticket=opened.ticket))
        self._line = line
        return line
