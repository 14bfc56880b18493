"""Model calls to devices of the pool, over NATS: with credits, in order, and never silently over."""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import AsyncGenerator, Iterable
from typing import Final

import msgspec
from hive_common.bus.allowance import Allowance
from hive_common.bus.intake import Intake
from hive_common.contracts.messages import InferRequest, StreamChunk, infer_subject, stream_subject
from hive_common.inference.calls import Answer, Head, ModelCall
from hive_common.inference.chunks import Receiver
from hive_common.inference.parts import parts_of
from hive_common.kernel.errors import InvalidArgument, Unavailable
from hive_common.kernel.ids import new_id
from nats.aio.client import Client
from nats.aio.msg import Msg

from hive_router.domain.selection import BackEnd
from hive_router.metrics import CHUNKS_REFUSED
from hive_router.settings import RouterSettings

log = logging.getLogger(__name__)

AFTER_RECONNECT_S: Final = 5.0
"""NATS was away: a device that says nothing for so long afterwards has been lost with what it said meanwhile."""

LOOK_S: Final = 1.0
"""How often NATS is asked whether the devices with calls still listen."""

CHUNKS: Final = Allowance(per_s=50_000, burst=50_000, in_flight=0, flood_per_s=10_000)
"""Of one device: a hundred streams of some hundred tokens a second each, five times over."""

_STRAYS_MAX: Final = 1_024
_decode = msgspec.json.Decoder(StreamChunk).decode
_encode = msgspec.json.Encoder().encode


class _Incoming:
    """A call at a device.

    It has an id of its own on NATS: a device never learns that of the call, under which the log keeps it.
    """

    __slots__ = ("executor", "id", "name", "receiver")

    def __init__(self, backend: BackEnd) -> None:
        self.id = new_id()
        self.executor = backend.executor
        self.name = backend.name
        self.receiver: Receiver


class _Answer:
    __slots__ = ("chunks", "head")

    def __init__(self, head: Head, chunks: AsyncGenerator[bytes, None]) -> None:
        self.head = head
        self.chunks = chunks


class Pool:
    """The way to devices.

    Args:
        settings: credit, and how long a device may take to begin.
    """

    def __init__(self, settings: RouterSettings) -> None:
        self._settings = settings
        self._calls: dict[str, _Incoming] = {}
        self._strays: OrderedDict[str, None] = OrderedDict()
        self._client: Client | None = None
        self._replies = ""

    async def open(self, client: Client) -> None:
        """Listen to what devices say."""
        self._client = client
        self._replies = client.new_inbox()
        await Intake(client, stream_subject("*", "*"), self._receive, self._flooded, CHUNKS, self._busy).open()
        await client.subscribe(f"{self._replies}.*", cb=self._replied)

    async def run(self) -> None:
        """Look for ever whether the devices with calls still listen."""
        while True:
            await asyncio.sleep(LOOK_S)
            for incoming in {one.executor: one for one in self._calls.values()}.values():
                # NATS says where nobody does; the device has nothing to do for it.
                await self._tell(incoming, InferRequest(op="credit", call=incoming.id), asks=True)

    async def complete(self, call: ModelCall, backend: BackEnd) -> Answer:
        """Begin a call at a device (`Completer.complete`).

        Raises:
            Unavailable: the device does not listen, was lost, or breaks the rules.
            HiveError: what the device says.
        """
        if self._client is None or not self._client.is_connected:
            # It would be sent later, when nobody waits for it any more.
            raise Unavailable("NATS cannot be reached now")
        incoming = _Incoming(backend)
        receiver = incoming.receiver = Receiver(
            backend.name,
            is_stream=call.stream,
            first_s=self._settings.first_byte_ms / 1000,
            credit=self._settings.credit,
            grant=lambda amount: self._tell(incoming, InferRequest(op="credit", call=incoming.id, credit=amount)),
            close=lambda still_sends: self._closed(incoming, still_sends),
        )
        self._calls[incoming.id] = incoming
        try:
            await self._ask(incoming, call)
        except BaseException:
            await receiver.aclose()
            raise
        head = await receiver.begun()
        if not 200 <= head.status < 400:
            await receiver.aclose()
            raise Unavailable(f"{backend.name}: it answered with status {head.status} and no error")
        return _Answer(Head(head.status, head.content_type), receiver)

    def gone(self, executor: str) -> None:
        """End the calls of a device that is not there any more."""
        for incoming in list(self._calls.values()):
            if incoming.executor == executor:
                incoming.receiver.fail(Unavailable(f"{incoming.name}: the device has gone"))

    async def reconnected(self) -> None:
        """NATS is back: what was said meanwhile may be lost, and then nothing may follow that shows it."""
        for incoming in self._calls.values():
            incoming.receiver.hurry(AFTER_RECONNECT_S)

    async def _closed(self, incoming: _Incoming, still_sends: bool) -> None:
        self._calls.pop(incoming.id, None)
        if still_sends:
            await self._tell(incoming, InferRequest(op="cancel", call=incoming.id))

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
            await self._tell(incoming, request, asks=True)

    async def _tell(self, incoming: _Incoming, request: InferRequest, *, asks: bool = False) -> None:
        # The reply subject is where NATS says that nobody listens; a device could not publish there.
        reply = f"{self._replies}.{incoming.id}" if asks else ""
        await self._publish(incoming.executor, request, reply)

    async def _publish(self, executor: str, request: InferRequest, reply: str = "") -> None:
        client = self._client
        if client is not None and client.is_connected:
            await client.publish(infer_subject(executor), _encode(request), reply=reply)

    async def _replied(self, message: Msg) -> None:
        incoming = self._calls.get(message.subject.rpartition(".")[2])
        if incoming is not None and (message.headers or {}).get("Status") == "503":
            for other in list(self._calls.values()):
                if other.executor == incoming.executor:
                    other.receiver.fail(Unavailable(f"{other.name}: it is not connected"))

    def _busy(self) -> Iterable[str]:
        return {incoming.executor for incoming in self._calls.values()}

    async def _flooded(self, executor: str, message: Msg) -> None:
        CHUNKS_REFUSED.labels("flood").inc()
        self.gone(executor)

    async def _receive(self, executor: str, message: Msg) -> None:
        call = message.subject.rpartition(".")[2]
        incoming = self._calls.get(call)
        if incoming is None:
            await self._stray(executor, call)
        elif incoming.executor != executor:
            CHUNKS_REFUSED.labels("foreign").inc()
        else:
            try:
                incoming.receiver.receive(_decode(message.data))
            except (msgspec.DecodeError, RecursionError):
                CHUNKS_REFUSED.labels("malformed").inc()
                incoming.receiver.fail(Unavailable(f"{incoming.name}: what it answered cannot be read"))

    async def _stray(self, executor: str, call: str) -> None:
        """Tell a device, once, that nobody waits for a call: this process may have been restarted since."""
        CHUNKS_REFUSED.labels("no_call").inc()
        if call in self._strays:
            return
        self._strays[call] = None
        if len(self._strays) > _STRAYS_MAX:
            self._strays.popitem(last=False)
        await self._publish(executor, InferRequest(op="cancel", call=call))
