"""One device's models against real NATS, scripted back ends, and a router that does as a test says."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from pathlib import Path
from typing import Any

import msgspec
from hive_common.bus.nats import connect, settled
from hive_common.contracts.messages import (
    Committed,
    InferRequest,
    ModelCallReport,
    ModelCallRequest,
    StreamChunk,
    call_subject,
    infer_subject,
    stream_subject,
)
from hive_common.contracts.values import digest_of
from hive_common.inference.calls import Answer, Completer, Endpoint, Head, ModelCall, OfferedModel
from hive_common.inference.chunks import Receiver, Sender
from hive_common.inference.parts import Assembly, parts_of
from hive_common.kernel.errors import HiveError, NotFound, body_of
from hive_common.kernel.ids import new_id
from hive_common.testing.identities import EVERYTHING
from hive_common.testing.nats import EmbeddedNats
from hive_executor.config import ExecutorConfig
from hive_executor.inference.service import DeviceModels
from hive_executor.link import Link
from nats.aio.client import Client
from nats.aio.msg import Msg

WAIT_S = 20.0


async def until(condition: Callable[[], Any]) -> None:
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


def call(
    model: str = "scripted", *, endpoint: Endpoint = "chat", stream: bool = False, pin: str = "any", **more: Any
) -> ModelCall:
    fields = {"messages": [{"role": "user", "content": "count for me"}], "model": model, **more}
    if stream:
        fields["stream"] = True
    return ModelCall(
        id=new_id(),
        endpoint=endpoint,
        model=model,
        body=msgspec.json.encode(fields),
        stream=stream,
        deadline_ms=20_000,
        pin=pin,
    )


async def read(chunks: AsyncGenerator[bytes, None]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


class Router:
    """Asks the device, and answers it with what `completer` has: nothing, at the beginning."""

    def __init__(self, client: Client, executor: str) -> None:
        self.client = client
        self.executor = executor
        self.completer: Completer | None = None
        self.asked: list[ModelCallRequest] = []
        self.reports: list[ModelCallReport] = []
        self.report_error: HiveError | None = None
        self.chunks: list[StreamChunk] = []
        self.sending: dict[str, asyncio.Task[str]] = {}
        self._senders: dict[str, Sender] = {}
        self._bodies: dict[str, Assembly] = {}
        self._receivers: dict[str, Receiver] = {}
        self._subscriptions: list[Any] = []

    async def start(self) -> None:
        subscribe = self.client.subscribe
        self._subscriptions = [
            await subscribe(call_subject(self.executor, "model"), cb=self._called),
            await subscribe(call_subject(self.executor, "model-done"), cb=self._reported),
        ]
        await subscribe(stream_subject(self.executor, "*"), cb=self._streamed)
        await settled(self.client)

    async def go(self) -> None:
        """Do not listen to the device any more."""
        for subscription in self._subscriptions:
            await subscription.unsubscribe()
        await settled(self.client)

    async def infer(self, asked: ModelCall, *, credit: int = 64) -> Receiver:
        receiver = Receiver(
            "device",
            is_stream=asked.stream,
            first_s=WAIT_S,
            grant=lambda more: self.tell(InferRequest(op="credit", call=asked.id, credit=more)),
            close=lambda still_sends: self._cancel(asked.id, still_sends),
            credit=credit,
        )
        self._receivers[asked.id] = receiver
        parts = parts_of(asked.body)
        for number, part in enumerate(parts):
            await self.tell(
                InferRequest(
                    op="call",
                    call=asked.id,
                    endpoint=asked.endpoint,
                    model=asked.model,
                    stream=asked.stream,
                    body=part,
                    part=number,
                    parts=len(parts),
                    credit=credit,
                    deadline_ms=asked.deadline_ms,
                )
            )
        return receiver

    async def tell(self, request: InferRequest) -> None:
        await self.client.publish(infer_subject(self.executor), msgspec.json.encode(request))

    async def _cancel(self, asked: str, still_sends: bool) -> None:
        if still_sends:
            await self.tell(InferRequest(op="cancel", call=asked))

    async def _streamed(self, message: Msg) -> None:
        chunk = msgspec.json.decode(message.data, type=StreamChunk)
        self.chunks.append(chunk)
        receiver = self._receivers.get(message.subject.rpartition(".")[2])
        if receiver is not None:
            receiver.receive(chunk)

    async def _called(self, message: Msg) -> None:
        request = msgspec.json.decode(message.data, type=ModelCallRequest)
        self.asked.append(request)
        if request.op == "credit" and request.call in self._senders:
            self._senders[request.call].grant(request.credit)
        elif request.op == "cancel" and request.call in self.sending:
            self.sending[request.call].cancel()
        elif request.op in ("call", "models"):
            body = self._bodies.setdefault(request.call, Assembly()).add(request)
            if body is not None:
                self._serve(request, body, message.reply)

    def _serve(self, request: ModelCallRequest, body: bytes, reply: str) -> None:
        sender = self._senders[request.call] = Sender(lambda data: self.client.publish(reply, data), request.credit)

        async def begin() -> Answer:
            if self.completer is None:
                raise NotFound(f"the model `{request.model}` is not here", model=request.model, nearest=())
            if request.op == "models":
                listed = [OfferedModel(**msgspec.structs.asdict(one)) for one in await self.completer.models()]
                return _Listed(msgspec.json.encode(listed))
            return await self.completer.complete(
                ModelCall(
                    id=request.call,
                    endpoint=request.endpoint,  # type: ignore[arg-type]
                    model=request.model,
                    body=body,
                    stream=request.stream,
                    deadline_ms=request.deadline_ms,
                )
            )

        self.sending[request.call] = asyncio.create_task(sender.run(begin, is_stream=request.stream))

    async def _reported(self, message: Msg) -> None:
        error = body_of(self.report_error) if self.report_error else None
        if error is None:
            self.reports.append(msgspec.json.decode(message.data, type=ModelCallReport))
        await message.respond(msgspec.json.encode(Committed(error=error)))


class _Listed:
    def __init__(self, body: bytes) -> None:
        async def once() -> AsyncGenerator[bytes, None]:
            yield body

        self.head = Head(200, "application/json")
        self.chunks = once()


class Place:
    """The device and its router."""

    def __init__(
        self, models: DeviceModels, link: Link, router: Router, config: ExecutorConfig, stored: list[bytes]
    ) -> None:
        self.models = models
        self.link = link
        self.router = router
        self.config = config
        self.stored = stored

    @property
    def completer(self) -> Completer:
        return self.models.completer


class Places:
    """Makes devices, and takes them apart at the end."""

    def __init__(self, nats: EmbeddedNats, folder: Path) -> None:
        self.nats = nats
        self._folder = folder
        self.ends: list[Callable[[], Any]] = []

    async def make(self, *urls: str, **more: Any) -> Place:
        executor = new_id()
        config = ExecutorConfig(
            name="device",
            executor_id=executor,
            nats=self.nats.issuer.executor(executor, self._folder),
            state_dir=str(self._folder),
            cache_dir=str(self._folder),
            ops_port=0,
            model_urls=urls,
            owner="owner",
            **more,
        )
        client = await connect(self.nats.issuer.service(EVERYTHING, self._folder), "router")
        self.ends.append(client.close)
        router = Router(client, executor)
        await router.start()
        link = Link(executor)
        await link.open(config.nats)
        self.ends.append(link.close)
        stored: list[bytes] = []

        async def store(data: bytes) -> str:
            stored.append(data)
            return digest_of(data)

        models = DeviceModels(config, link, store)
        await models.open()
        self.ends.append(models.close)
        await models.connect()
        await settled(link.client)
        tasks: list[asyncio.Task[None]] = []
        models.run(lambda name, work: tasks.append(asyncio.create_task(work, name=name)), lambda: None)
        self.ends.append(models.disconnect)

        async def end() -> None:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

        self.ends.append(end)
        return Place(models, link, router, config, stored)

    async def close(self) -> None:
        for end in reversed(self.ends):
            await end()
