"""Model calls to devices of the pool, over NATS: with credits, in order, and never silently over."""

import asyncio
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator
from typing import Final

import msgspec
from hive_common.contracts.messages import InferRequest, StreamChunk, infer_subject, stream_subject
from hive_common.inference.calls import Answer, Head, ModelCall
from hive_common.kernel.errors import HiveError, InvalidArgument, Unavailable
from hive_common.kernel.ids import new_id
from nats.aio.client import Client
from nats.aio.msg import Msg

from hive_router.closing import ClosingStream
from hive_router.domain.selection import BackEnd
from hive_router.metrics import CHUNKS_REFUSED
from hive_router.parts import parts_of
from hive_router.settings import RouterSettings

log = logging.getLogger(__name__)

BUFFERED_BYTES_MAX: Final = 8 * 1024 * 1024
"""Of one call. Chunks of tokens have some hundred bytes; a device that sends more than this ahead floods."""

AFTER_RECONNECT_S: Final = 5.0
"""NATS was away: a device that says nothing for so long afterwards has been lost with what it said meanwhile."""

_STRAYS_MAX: Final = 1_024
_decode = msgspec.json.Decoder(StreamChunk).decode
_encode = msgspec.json.Encoder().encode


class _Incoming:
    """What has come of one call and was not taken yet.

    It has an id of its own on NATS: a device never learns that of the call, under which the log keeps it.
    """

    __slots__ = (
        "buffered_bytes",
        "chunks",
        "credit",
        "error",
        "executor",
        "head",
        "id",
        "is_over",
        "name",
        "sequence",
        "silence_s",
        "taken",
        "wake",
    )

    def __init__(self, backend: BackEnd, credit: int, silence_s: float) -> None:
        self.id = new_id()
        self.executor = backend.executor
        self.name = backend.name
        self.credit = credit
        self.silence_s = silence_s
        self.chunks: deque[bytes] = deque()
        self.buffered_bytes = self.sequence = self.taken = 0
        self.head: StreamChunk | None = None
        self.error: HiveError | None = None
        self.is_over = False
        self.wake = asyncio.Event()

    def fail(self, error: HiveError) -> None:
        """End with an error, unless it has ended."""
        if not self.is_over:
            self.error, self.is_over = error, True
            self.wake.set()

    def receive(self, chunk: StreamChunk, silence_s: float) -> None:
        """Take a chunk, or end the call where it is not the one that has to come now."""
        if self.is_over:
            return
        if chunk.sequence != self.sequence:
            self.fail(Unavailable(f"{self.name}: piece {self.sequence} of the answer was lost"))
            return
        self.sequence += 1
        self.credit -= 1
        self.silence_s = silence_s
        if chunk.error is not None:
            self.fail(chunk.error.raised())
            return
        if self.head is None:
            self.head = chunk
        if chunk.data:
            data = chunk.data.encode()
            self.chunks.append(data)
            self.buffered_bytes += len(data)
        if self.credit < 0 or self.buffered_bytes > BUFFERED_BYTES_MAX:
            self.chunks.clear()
            self.fail(Unavailable(f"{self.name}: it sent more than it was asked for"))
            return
        self.is_over = chunk.end
        self.wake.set()

    def take(self) -> bytes:
        """Return all that is there."""
        chunks = self.chunks
        self.taken += len(chunks)
        data = chunks.popleft() if len(chunks) == 1 else b"".join(chunks)
        chunks.clear()
        self.buffered_bytes = 0
        return data

    async def more(self, within_s: float) -> None:
        """Return when something has come. Raises Unavailable where nothing does."""
        self.wake.clear()
        try:
            async with asyncio.timeout(within_s):
                await self.wake.wait()
        except TimeoutError:
            raise Unavailable(f"{self.name}: it has said nothing for {within_s:g} s") from None


class _Answer:
    __slots__ = ("chunks", "head")

    def __init__(self, head: Head, chunks: AsyncGenerator[bytes, None]) -> None:
        self.head = head
        self.chunks = chunks


class Pool:
    """The way to devices.

    Args:
        settings: credit, and how long a device may be silent.
    """

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._first_byte_s = settings.first_byte_ms / 1000
        self._silence_s = settings.silence_ms / 1000
        self._calls: dict[str, _Incoming] = {}
        self._strays: OrderedDict[str, None] = OrderedDict()
        self._client: Client | None = None
        self._replies = ""

    async def open(self, client: Client) -> None:
        """Listen to what devices say."""
        self._client = client
        self._replies = client.new_inbox()
        await client.subscribe(stream_subject("*", "*"), cb=self._receive)
        await client.subscribe(f"{self._replies}.*", cb=self._replied)

    async def complete(self, call: ModelCall, backend: BackEnd) -> Answer:
        """Begin a call at a device (`Completer.complete`).

        Raises:
            Unavailable: the device does not listen, was lost, or breaks the rules.
            HiveError: what the device says.
        """
        incoming = _Incoming(backend, self._settings.credit, self._first_byte_s)
        self._calls[incoming.id] = incoming
        try:
            await self._ask(incoming, call)
            while incoming.head is None:
                if incoming.error is not None:
                    raise incoming.error
                await incoming.more(incoming.silence_s)
        except BaseException:
            await self._let_go(incoming)
            raise
        head = incoming.head
        if not 200 <= head.status < 400:
            await self._let_go(incoming)
            raise Unavailable(f"{backend.name}: answered with status {head.status} and no error")
        return _Answer(Head(head.status, head.content_type), _Chunks(self, incoming))

    def gone(self, executor: str) -> None:
        """End the calls of a device that is not there any more."""
        for incoming in list(self._calls.values()):
            if incoming.executor == executor:
                incoming.fail(Unavailable(f"{incoming.name}: the device has gone"))

    async def reconnected(self) -> None:
        """NATS is back: what was said meanwhile may be lost, and then nothing may follow that shows it."""
        for incoming in self._calls.values():
            incoming.silence_s = min(incoming.silence_s, AFTER_RECONNECT_S)
            incoming.wake.set()

    async def granted(self, incoming: _Incoming) -> None:
        """Let the device go on, once half of what it may be ahead was taken."""
        if incoming.taken >= self._settings.credit // 2 and not incoming.is_over:
            amount, incoming.taken = incoming.taken, 0
            incoming.credit += amount
            await self._tell(incoming.executor, InferRequest(op="credit", call=incoming.id, credit=amount))

    async def _let_go(self, incoming: _Incoming) -> None:
        if self._calls.pop(incoming.id, None) is not None and (not incoming.is_over or incoming.error is not None):
            incoming.is_over = True
            await self._tell(incoming.executor, InferRequest(op="cancel", call=incoming.id))

    async def _ask(self, incoming: _Incoming, call: ModelCall) -> None:
        try:
            parts = parts_of(call.body)
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"body: not UTF-8 at byte {error.start}", path="body") from error
        for number, part in enumerate(parts):
            request = InferRequest(
                op="call",
                call=incoming.id,
                endpoint=call.endpoint,
                model=call.model,
                stream=call.stream,
                body=part,
                part=number,
                parts=len(parts),
                credit=self._settings.credit,
                deadline_ms=call.deadline_ms,
            )
            # The reply subject is where NATS says that nobody listens; a device could not publish there.
            await self._tell(incoming.executor, request, f"{self._replies}.{incoming.id}")

    async def _tell(self, executor: str, request: InferRequest, reply: str = "") -> None:
        client = self._client
        if client is None or not client.is_connected:
            # What would be sent later, when the call is long over, must not be sent at all.
            if request.op == "call":
                raise Unavailable("NATS cannot be reached now")
            return
        await client.publish(infer_subject(executor), _encode(request), reply=reply)

    async def _replied(self, message: Msg) -> None:
        incoming = self._calls.get(message.subject.rpartition(".")[2])
        if incoming is not None and (message.headers or {}).get("Status") == "503":
            incoming.fail(Unavailable(f"{incoming.name}: it is not connected"))

    async def _receive(self, message: Msg) -> None:
        _, _, executor, _, call = message.subject.split(".")
        incoming = self._calls.get(call)
        if incoming is None:
            await self._stray(executor, call)
            return
        if incoming.executor != executor:
            CHUNKS_REFUSED.labels("foreign").inc()
            return
        try:
            chunk = _decode(message.data)
        except (msgspec.DecodeError, RecursionError):
            CHUNKS_REFUSED.labels("malformed").inc()
            incoming.fail(Unavailable(f"{incoming.name}: what it answered cannot be read"))
            return
        incoming.receive(chunk, self._silence_s)

    async def _stray(self, executor: str, call: str) -> None:
        """Tell a device, once, that nobody waits for a call: this process may have been restarted since."""
        CHUNKS_REFUSED.labels("no_call").inc()
        if call in self._strays:
            return
        self._strays[call] = None
        if len(self._strays) > _STRAYS_MAX:
            self._strays.popitem(last=False)
        await self._tell(executor, InferRequest(op="cancel", call=call))


class _Chunks(ClosingStream):
    """The pieces of an answer; as many at once as are there."""

    __slots__ = ("_incoming", "_pool")

    def __init__(self, pool: Pool, incoming: _Incoming) -> None:
        self._pool = pool
        self._incoming = incoming

    async def asend(self, value: None, /) -> bytes:
        """Return what has come since the last time. Raises what the device says, and what became of it."""
        incoming = self._incoming
        try:
            while True:
                if incoming.chunks:
                    data = incoming.take()
                    await self._pool.granted(incoming)
                    return data
                if incoming.error is not None:
                    raise incoming.error
                if incoming.is_over:
                    break
                await incoming.more(incoming.silence_s)
        except BaseException:
            await self.aclose()
            raise
        await self.aclose()
        raise StopAsyncIteration

    async def aclose(self) -> None:
        """Tell the device that nobody waits any more, unless it has ended."""
        await self._pool._let_go(self._incoming)
