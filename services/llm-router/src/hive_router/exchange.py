"""`hive.models.v1.Exchange`: the calls of the gateway, on one connection."""

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any, Final

import grpc.aio
import msgspec
from hive_common.inference.calls import Answer
from hive_common.kernel.errors import HiveError, Unavailable, body_of
from hive_common.rpc.frames import Frames
from hive_common.rpc.server import MESSAGE_BYTES_MAX
from hive_proto.models.v1 import models_pb2, models_pb2_grpc
from hive_proto.models.v1.models_pb2 import ExchangeRequest, ExchangeResponse

from hive_router.models import ModelsServicer, head_of

log = logging.getLogger(__name__)

AHEAD_BYTES: Final = 256 * 1024
"""So much of a stream is sent before the other end has granted more."""

TICKET_S: Final = 10.0
TICKETS_MAX: Final = 64
TICKET_BYTES: Final = 32
FIRST_BYTES_MAX: Final = 256
"""Of what somebody sends who has not shown a ticket."""

GRACE_S: Final = 1.0
"""At the end of this process, for calls that run."""


class Exchange(models_pb2_grpc.ExchangeServicer):
    """Opens connections for calls, and makes the calls that come on them.

    Args:
        models: makes the calls.
        host: address to listen at. The port is a free one; `Open` tells which.
    """

    def __init__(self, models: ModelsServicer, host: str) -> None:
        self._models = models
        self._host = host
        self._server: asyncio.Server | None = None
        self._tickets: dict[bytes, asyncio.TimerHandle] = {}
        self._lines: set[_Line] = set()

    async def start(self) -> None:
        """Listen."""
        self._server = await asyncio.get_running_loop().create_server(self._line, self._host, 0)

    async def stop(self) -> None:
        """Take no more connections; calls that run have a moment, then they are cancelled."""
        if self._server is not None:
            self._server.close()
        for timer in self._tickets.values():
            timer.cancel()
        await asyncio.gather(*(line.end(GRACE_S) for line in list(self._lines)))

    async def Open(
        self, request: models_pb2.OpenRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> models_pb2.OpenResponse:
        """Say where to connect, and what to show there."""
        if self._server is None or len(self._tickets) >= TICKETS_MAX:
            raise Unavailable("no connection for calls can be opened now")
        ticket = secrets.token_bytes(TICKET_BYTES)
        self._tickets[ticket] = asyncio.get_running_loop().call_later(TICKET_S, self._tickets.pop, ticket, None)
        return models_pb2.OpenResponse(port=self._server.sockets[0].getsockname()[1], ticket=ticket)

    def _line(self) -> Frames[ExchangeRequest]:
        line = _Line(self._models, self._admits, self._lines.discard)
        self._lines.add(line)
        return line.frames

    def _admits(self, ticket: bytes) -> bool:
        # How long a look-up takes tells nothing of use about 32 random bytes that live for seconds.
        timer = self._tickets.pop(ticket, None)
        if timer is not None:
            timer.cancel()
        return timer is not None


class _Running:
    """A call that is being answered, and how much of its stream may still be sent."""

    __slots__ = ("_granted", "left", "task")

    def __init__(self) -> None:
        self.task: asyncio.Task[None]
        self.left = AHEAD_BYTES
        self._granted: asyncio.Future[None] | None = None

    def grant(self, amount: int) -> None:
        """Allow more bytes."""
        self.left += max(0, amount)
        if self.left > 0 and self._granted is not None and not self._granted.done():
            self._granted.set_result(None)

    async def may_send(self) -> None:
        """Return once something may be sent."""
        while self.left <= 0:
            self._granted = asyncio.get_running_loop().create_future()
            await self._granted


class _Line:
    """One connection and the calls on it. All of them are cancelled when it ends."""

    def __init__(
        self, models: ModelsServicer, admits: Callable[[bytes], bool], ended: Callable[["_Line"], None]
    ) -> None:
        self._models = models
        self._admits = admits
        self._ended = ended
        self._is_admitted = False
        self._calls: dict[str, _Running] = {}
        self.frames = Frames(ExchangeRequest.FromString, self._took, self._lost)
        self.frames.bytes_max = FIRST_BYTES_MAX
        # Whoever connects and says nothing is let go.
        self._patience = asyncio.get_running_loop().call_later(TICKET_S, self.frames.abort)

    async def end(self, grace_s: float) -> None:
        """Give calls a moment, then end the connection and cancel them."""
        tasks = {one.task for one in self._calls.values()}
        if tasks:
            await asyncio.wait(tasks, timeout=grace_s)
        self.frames.close()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _lost(self) -> None:
        self._patience.cancel()
        for one in list(self._calls.values()):
            one.task.cancel()
        self._ended(self)

    def _took(self, request: ExchangeRequest) -> None:
        if not self._is_admitted:
            self._begin(request.ticket)
        elif request.HasField("call"):
            self._call(request)
        elif request.grant:
            if (granted := self._calls.get(request.grant)) is not None:
                granted.grant(request.grant_bytes)
        elif (cancelled := self._calls.get(request.cancel)) is not None:
            cancelled.task.cancel()

    def _begin(self, ticket: bytes) -> None:
        self._patience.cancel()
        if not self._admits(ticket):
            log.warning("a connection for calls was refused: its ticket is not known")
            self.frames.abort()
            return
        self._is_admitted = True
        self.frames.bytes_max = MESSAGE_BYTES_MAX

    def _call(self, request: ExchangeRequest) -> None:
        call_id = request.call.call_id
        if call_id in self._calls:
            # Whoever makes ids twice cannot tell the answers apart: that ends the connection.
            raise ValueError(f"the call {call_id} runs already")
        running = self._calls[call_id] = _Running()
        running.task = asyncio.create_task(self._make(request, running))

    async def _make(self, request: ExchangeRequest, running: _Running) -> None:
        call_id = request.call.call_id
        try:
            answer = await self._models.begin(request.call, request.deadline_ms / 1000)
            try:
                await (self._stream if request.call.stream else self._whole)(call_id, answer, running)
            finally:
                await answer.chunks.aclose()
        except Exception as error:
            if not isinstance(error, HiveError):
                log.exception("call %s failed", call_id)
            self._tell(call_id, error)
        finally:
            del self._calls[call_id]

    async def _whole(self, call_id: str, answer: Answer, running: _Running) -> None:
        """Send an answer, nearly always in one message. Whoever asked holds all of it anyway."""
        chunks = answer.chunks
        message = await _first(call_id, answer)
        while (following := await anext(chunks, None)) is not None:
            await self._send(message)
            message = ExchangeResponse(call_id=call_id, chunk=following)
        message.last = True
        self.frames.send(message)

    async def _stream(self, call_id: str, answer: Answer, running: _Running) -> None:
        """Send pieces as they come, no further ahead than was granted."""
        first = await _first(call_id, answer)
        running.left -= len(first.head.chunk)
        await self._send(first)
        async for chunk in answer.chunks:
            if running.left <= 0:
                await running.may_send()
            running.left -= len(chunk)
            await self._send(ExchangeResponse(call_id=call_id, chunk=chunk))
        self.frames.send(ExchangeResponse(call_id=call_id, last=True))

    async def _send(self, message: ExchangeResponse) -> None:
        self.frames.send(message)
        await self.frames.drain()

    def _tell(self, call_id: str, error: Exception) -> None:
        told = msgspec.json.encode(body_of(error), enc_hook=str)
        self.frames.send(ExchangeResponse(call_id=call_id, error_json=told, last=True))


async def _first(call_id: str, answer: Answer) -> ExchangeResponse:
    """Return the head, with the first piece, which is there already."""
    return ExchangeResponse(call_id=call_id, head=head_of(answer.head, await anext(answer.chunks, b"")))
