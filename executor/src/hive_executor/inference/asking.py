"""The way to the models of others: calls to the router, `hive.exec.<id>.call.model`, answered at an inbox."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Sequence
from typing import Final

import msgspec
from hive_common.contracts.messages import ModelCallRequest, StreamChunk, call_subject
from hive_common.inference.calls import Answer, Head, ModelCall, OfferedModel
from hive_common.inference.chunks import CREDIT, Receiver
from hive_common.inference.parts import parts_of
from hive_common.kernel.errors import HiveError, InvalidArgument, Unavailable
from hive_common.kernel.ids import new_id
from nats.aio.msg import Msg

from hive_executor.link import Link

log = logging.getLogger(__name__)

AFTER_RECONNECT_S: Final = 5.0
"""NATS was away: who says nothing for so long afterwards has lost what was to be said, or was lost."""

AWAY_S_MAX: Final = 10.0
"""Without NATS for so long, calls end that wait for an answer over it."""

LOOK_S: Final = 2.0
LIST_S: Final = 2.0
SUBJECT: Final = "model"
_NO_WAY: Final = "the control plane cannot be reached; only models of this device can be called now"
_decode = msgspec.json.Decoder(StreamChunk).decode
_encode = msgspec.json.Encoder().encode


class RouterWay:
    """A `Completer` that asks the router, as this executor.

    Args:
        link: to the control plane.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._subject = call_subject(link.executor_id, SUBJECT)
        self._inbox = ""
        self._receivers: dict[str, Receiver] = {}
        self._away: asyncio.TimerHandle | None = None
        link.on_reset(self._reset)

    async def open(self) -> None:
        """Listen for answers."""
        self._inbox = self._link.client.new_inbox()
        await self._link.client.subscribe(f"{self._inbox}.*", cb=self._receive)

    async def run(self) -> None:
        """Look again and again whether the router is still there for calls that wait. Ends by being cancelled."""
        while True:
            await asyncio.sleep(LOOK_S)
            for call in tuple(self._receivers):
                # NATS answers where nobody listens.
                await self._tell(ModelCallRequest(op="credit", call=call, credit=0))

    async def complete(self, call: ModelCall) -> Answer:
        """Begin a call; see `Completer`."""
        request = ModelCallRequest(
            op="call",
            call=call.id,
            endpoint=call.endpoint,
            model=call.model,
            stream=call.stream,
            credit=CREDIT,
            deadline_ms=call.deadline_ms,
            pin=call.pin,
            tokens_max=call.tokens_max,
            token=call.token,
            counts_only=call.counts_only,
        )
        return await self._ask(request, call.body, call.deadline_ms / 1000)

    async def models(self) -> Sequence[OfferedModel]:
        """Return what others serve, as the router knows it."""
        answer = await self._ask(ModelCallRequest(op="models", call=new_id(), credit=CREDIT), b"", LIST_S)
        body = b"".join([piece async for piece in answer.chunks])
        try:
            return msgspec.json.decode(body, type=list[OfferedModel])
        except msgspec.DecodeError as error:
            raise Unavailable(f"the router's list of models does not fit: {error}") from error

    async def _ask(self, request: ModelCallRequest, body: bytes, first_s: float) -> Answer:
        if not self._inbox or not self._link.is_connected:
            raise Unavailable(_NO_WAY)
        try:
            parts = parts_of(body)
        except UnicodeDecodeError as error:
            raise InvalidArgument(f"body: not UTF-8 at byte {error.start}", path="body") from error
        receiver = self._receivers[request.call] = Receiver(
            "the router",
            is_stream=request.stream,
            first_s=first_s,
            grant=lambda credit: self._tell(ModelCallRequest(op="credit", call=request.call, credit=credit)),
            close=lambda still_sends: self._closed(request.call, still_sends),
        )
        try:
            for number, part in enumerate(parts):
                token = "" if number else request.token
                piece = msgspec.structs.replace(request, body=part, part=number, parts=len(parts), token=token)
                await self._publish(piece)
        except BaseException:
            await receiver.aclose()
            raise
        return _Answer(await receiver.begun(), receiver)

    async def _closed(self, call: str, still_sends: bool) -> None:
        self._receivers.pop(call, None)
        if still_sends:
            await self._tell(ModelCallRequest(op="cancel", call=call))

    async def _tell(self, request: ModelCallRequest) -> None:
        # What would be sent later, when the call is long over, must not be sent at all.
        if not self._link.is_connected:
            return
        try:
            await self._publish(request)
        except HiveError as error:
            log.info("call %s: %s could not be told: %s", request.call, request.op, error.message)

    async def _publish(self, request: ModelCallRequest) -> None:
        await self._link.publish(self._subject, _encode(request), f"{self._inbox}.{request.call}")

    async def _receive(self, message: Msg) -> None:
        receiver = self._receivers.get(message.subject.rpartition(".")[2])
        if receiver is None:
            return
        if not message.data and (message.headers or {}).get("Status") == "503":
            receiver.fail(Unavailable("the router is not there; only models of this device can be called now"))
            return
        try:
            chunk = _decode(message.data)
        except (msgspec.DecodeError, RecursionError) as error:
            receiver.fail(Unavailable(f"what the router answered cannot be read: {error}"))
            return
        receiver.receive(chunk)

    def _reset(self) -> None:
        if not self._link.is_connected:
            if self._away is None:
                self._away = asyncio.get_running_loop().call_later(AWAY_S_MAX, self._give_up)
        elif self._away is not None:
            self._away.cancel()
            self._away = None
            for receiver in tuple(self._receivers.values()):
                receiver.hurry(AFTER_RECONNECT_S)

    def _give_up(self) -> None:
        for receiver in tuple(self._receivers.values()):
            receiver.fail(Unavailable(f"the control plane could not be reached for {AWAY_S_MAX:g} s"))


class _Answer(msgspec.Struct):
    head: Head
    chunks: AsyncGenerator[bytes, None]
