"""Devices of the pool that speak `infer` and `stream`, and say what a test wants them to say."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import msgspec
from hive_common.bus.nats import connect
from hive_common.contracts.messages import (
    InferRequest,
    ModelCallRequest,
    StreamChunk,
    call_subject,
    inbox_prefix,
    infer_subject,
    stream_subject,
)
from hive_common.kernel.ids import new_id
from hive_common.ops.config import NatsConfig
from hive_common.testing.scripted import text_of
from nats.aio.client import Client
from nats.aio.msg import Msg


def token_event(number: int) -> str:
    delta = {"choices": [{"index": 0, "delta": {"content": f"{number} "}, "finish_reason": None}]}
    return f"data: {msgspec.json.encode(delta).decode()}\n\n"


USAGE_EVENT = 'data: {"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":%d}}\n\n'
DONE = "data: [DONE]\n\n"


class InferCall:
    """A call that came to a device."""

    def __init__(self, device: "Device", request: InferRequest) -> None:
        self.device = device
        self.request = request
        self.body = request.body
        self.parts = 1
        self.credit = request.credit
        self.sequence = 0
        self.more = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def say(self, data: str = "", **fields: Any) -> None:
        """Send the next chunk, whatever the credit; the first one is the head."""
        if self.sequence == 0:
            kind = "text/event-stream" if self.request.stream else "application/json"
            fields = {"status": 200, "content_type": kind, **fields}
        sequence = fields.pop("sequence", self.sequence)
        self.sequence = sequence + 1
        chunk = StreamChunk(sequence=sequence, data=data, **fields)
        await self.device.publish(stream_subject(self.device.id, self.request.call), chunk)

    async def say_with_credit(self, data: str = "", **fields: Any) -> None:
        while self.credit <= 0:
            self.more.clear()
            await self.more.wait()
        self.credit -= 1
        await self.say(data, **fields)

    async def answer(self, tokens: int = 16) -> None:
        """Answer as a device should."""
        if not self.request.stream:
            message = {"role": "assistant", "content": text_of(tokens)}
            body = {"choices": [{"index": 0, "message": message}], "usage": {"completion_tokens": tokens}}
            await self.say_with_credit(msgspec.json.encode(body).decode())
        else:
            for number in range(tokens):
                await self.say_with_credit(token_event(number))
            await self.say_with_credit(USAGE_EVENT % tokens)
            await self.say_with_credit(DONE)
        await self.say_with_credit(end=True)


Play = Callable[[InferCall], Awaitable[None]]


class Device:
    """An executor as far as models go.

    Attributes:
        play: answers a call.
        calls: that came, by their ids on the wire.
    """

    def __init__(self, client: Client, executor: str, play: Play) -> None:
        self.client = client
        self.id = executor
        self.play = play
        self.calls: dict[str, InferCall] = {}
        self._running: set[asyncio.Task[None]] = set()

    async def publish(self, subject: str, body: msgspec.Struct, reply: str = "") -> None:
        await self.client.publish(subject, msgspec.json.encode(body), reply=reply)

    async def listen(self) -> None:
        await self.client.subscribe(infer_subject(self.id), cb=self._receive)
        await self.client.flush()

    async def close(self) -> None:
        for task in self._running:
            task.cancel()
        await self.client.close()

    async def _receive(self, message: Msg) -> None:
        request = msgspec.json.decode(message.data, type=InferRequest)
        known = self.calls.get(request.call)
        if request.op == "call":
            if known is None:
                known = self.calls[request.call] = InferCall(self, request)
            else:
                assert request.part == known.parts
                known.body += request.body
                known.parts += 1
            if known.parts == request.parts:
                task = asyncio.ensure_future(self.play(known))
                self._running.add(task)
                task.add_done_callback(self._running.discard)
        elif request.op == "credit" and known is not None:
            known.credit += request.credit
            known.more.set()
        elif request.op == "cancel":
            known = known or self.calls.setdefault(request.call, InferCall(self, request))
            known.cancelled.set()

    def ask(self, model: str, **fields: Any) -> "Asking":
        """Prepare a call of this device to the router."""
        return Asking(self, model, fields)


class Asking:
    """A call that a device makes."""

    def __init__(self, device: Device, model: str, fields: dict[str, Any]) -> None:
        self.device = device
        self.reply = fields.pop("reply", f"{inbox_prefix(device.id)}.{new_id()}")
        body = {"model": model, "messages": [], **fields.pop("body", {})}
        if fields.get("stream"):
            body["stream"] = True
        self.request = ModelCallRequest(
            **{
                "op": "call",
                "call": new_id(),
                "endpoint": "chat",
                "model": model,
                "body": msgspec.json.encode(body).decode(),
                "credit": 1_000,
                "deadline_ms": 30_000,
                **fields,
            },
        )
        self.chunks: asyncio.Queue[StreamChunk] = asyncio.Queue()

    async def begin(self) -> "Asking":
        await self.device.client.subscribe(self.reply, cb=self._receive)
        await self.send(self.request)
        return self

    async def send(self, request: ModelCallRequest) -> None:
        await self.device.publish(call_subject(self.device.id, "model"), request, self.reply)

    async def tell(self, op: str, **fields: Any) -> None:
        await self.send(ModelCallRequest(op=op, call=self.request.call, **fields))

    async def all(self) -> list[StreamChunk]:
        return await self.all_after([])

    async def all_after(self, found: list[StreamChunk]) -> list[StreamChunk]:
        found = found or [await self.chunks.get()]
        while not found[-1].end:
            found.append(await self.chunks.get())
        assert [chunk.sequence for chunk in found] == list(range(len(found)))
        return found

    async def _receive(self, message: Msg) -> None:
        self.chunks.put_nowait(msgspec.json.decode(message.data, type=StreamChunk))


@contextlib.asynccontextmanager
async def running_device(config: NatsConfig, executor: str, play: Play | None = None) -> AsyncIterator[Device]:
    """Connect a device with its own inbox, listening to `infer`."""
    client = await connect(config, executor, inbox=inbox_prefix(executor))
    device = Device(client, executor, play or InferCall.answer)
    try:
        await device.listen()
        yield device
    finally:
        await device.close()
