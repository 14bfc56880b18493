import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.bus.heads import head_announcer
from hive_common.bus.nats import connect
from hive_common.contracts.events import SCHEMA, Capabilities, Event, Model, ModelCallFinished, decode, encode
from hive_common.eventlog.log import Append, LogReader, LogWriter, NewEvent, Stored
from hive_common.inference.calls import Endpoint
from hive_common.kernel.ids import new_id
from hive_common.ops.config import ServiceConfig
from hive_common.rpc.client import call, stream
from hive_common.rpc.rules import NO_RULES, KeyRules, metadata_of
from hive_common.testing.fixtures import Database, NatsServer
from hive_common.testing.scripted import Script, ScriptedBackEnd
from hive_common.testing.services import key_of, running_service, service_config
from hive_common.testing.tokens import TokenKey
from hive_proto.models.v1 import models_pb2 as pb
from hive_proto.models.v1 import models_pb2_grpc
from hive_router.bootstrap import main

from .devices import Device, Play, running_device


def capabilities(*models: Model, **changes: Any) -> Capabilities:
    base = Capabilities(os="linux", arch="x86_64", cores=1, memory_bytes=1, slots=1, runtimes=(), models=models)
    return msgspec.structs.replace(base, **changes)


class Log:
    """Executors as the registry would write them."""

    def __init__(self, writer: LogWriter, reader: LogReader) -> None:
        self._writer = writer
        self.reader = reader
        self._versions: dict[str, int] = {}

    async def add(self, executor: str, *events: Event, owner: str = "owner") -> int:
        position = 0
        for event in events:
            position = await self.append(executor, type(event).__name__, SCHEMA, encode(event), owner)
        return position

    async def append(
        self, executor: str, event_type: str, schema: int, payload: bytes, owner: str = "owner"
    ) -> int:
        self._versions[executor] = version = self._versions.get(executor, 0) + 1
        event = NewEvent(
            stream=executor,
            version=version,
            type=event_type,
            schema=schema,
            payload=payload,
            ts_us=1,
            actor=executor,
            owner=owner,
        )
        return await self._writer.append(Append((event,)))

    async def call(self, call_id: str) -> tuple[Stored, ModelCallFinished]:
        """Return the record of a call, once it is there. The test's timeout bounds it."""
        while not (found := await self.reader.read(0, 1, streams=[call_id])):
            await asyncio.sleep(0.02)
        assert found[0].payload is not None
        event = decode(found[0].type, found[0].schema, found[0].payload)
        assert isinstance(event, ModelCallFinished)
        return found[0], event


def piece_of(message: pb.CompleteResponse) -> bytes:
    """Return what a message holds of the body."""
    return message.chunk or message.head.chunk


class Answered:
    """An answer as a caller of the router has it."""

    def __init__(self, call_id: str, messages: list[pb.CompleteResponse]) -> None:
        self.id = call_id
        self.head = messages[0].head
        self.body = b"".join(piece_of(message) for message in messages)

    @property
    def json(self) -> dict[str, Any]:
        return msgspec.json.decode(self.body, type=dict[str, Any])

    @property
    def events(self) -> list[bytes]:
        assert self.body.endswith(b"\n\n")
        return [event.removeprefix(b"data: ") for event in self.body.split(b"\n\n")[:-1]]

    @property
    def text(self) -> str:
        said = ""
        for event in self.events:
            if event != b"[DONE]":
                for choice in msgspec.json.decode(event).get("choices", ()):
                    said += choice["delta"].get("content") or ""
        return said

    @property
    def error(self) -> dict[str, Any] | None:
        last = self.events[-1]
        found: dict[str, Any] | None = None if last == b"[DONE]" else msgspec.json.decode(last).get("error")
        return found


class Router:
    """A running router and what a test does with it."""

    def __init__(self, config: ServiceConfig, channel: Any, nats: NatsServer) -> None:
        self.config = config
        self.nats = nats
        self.folder = Path(config.artifacts_dir).parent
        self.key = key_of(config)
        self.rules = KeyRules(key="key-1")
        """Of the key with which calls come."""
        self.channel = channel
        self.stub = models_pb2_grpc.ModelsStub(channel)

    def device(self, executor: str, play: Play | None = None) -> contextlib.AbstractAsyncContextManager[Device]:
        """Run a device with its own credentials."""
        return running_device(self.nats.issuer.executor(executor, self.folder), executor, play)

    def begin(
        self, model: str = "scripted", *, endpoint: Endpoint = "chat", timeout: float = 30, **changes: Any
    ) -> Any:
        """Begin a call. `body` fields stand in `body`, `key` and `cloud` beside it, the rest in the request."""
        body = {"model": model, "messages": [{"role": "user", "content": "count"}], **changes.pop("body", {})}
        streams = changes.get("stream", False)
        if streams:
            body["stream"] = True
        beside = {name: changes.pop(name) for name in ("key", "cloud") if name in changes}
        rules = msgspec.structs.replace(self.rules, **beside)
        fields = {"call_id": new_id(), "caller": "caller-1", **changes}
        raw = fields.pop("raw", None) or msgspec.json.encode(body)
        request = pb.CompleteRequest(endpoint=endpoint, model=model, body=raw, **fields)
        return self.stub.Complete(request, metadata=(*self.key, *metadata_of(rules)), timeout=timeout)

    async def complete(self, model: str = "scripted", **changes: Any) -> Answered:
        call_id = changes.setdefault("call_id", new_id())
        return Answered(call_id, [message async for message in stream(self.begin(model, **changes))])

    async def explain(self, call_id: str, rules: KeyRules = NO_RULES) -> pb.Explanation:
        metadata = (*self.key, *metadata_of(rules))
        return await call(self.stub.Explain(pb.ExplainRequest(call_id=call_id), metadata=metadata))

    async def models(self, limit: int = 0) -> list[pb.Model]:
        return list((await call(self.stub.List(pb.ListRequest(limit=limit), metadata=self.key))).models)

    async def models_once(self, until: Callable[[list[pb.Model]], bool]) -> list[pb.Model]:
        """The view follows the log; ask until it has what the test wrote. The test's timeout bounds it."""
        while not until(found := await self.models()):
            await asyncio.sleep(0.02)
        return found


TOKENS = TokenKey()

Start = Callable[..., contextlib.AbstractAsyncContextManager[Router]]


@pytest.fixture
def config(database: Database, nats_server: NatsServer, tmp_path: Path) -> ServiceConfig:
    return service_config("router", database, nats_server, tmp_path, token_public_key=TOKENS.public)


@pytest.fixture
def start(config: ServiceConfig, nats_server: NatsServer) -> Start:
    """Run a router with given `extra` until the block ends."""

    @contextlib.asynccontextmanager
    async def started(**extra: Any) -> AsyncIterator[Router]:
        peers = extra.pop("peers", config.peers)
        raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in extra.items()}
        own = msgspec.structs.replace(config, extra=raw, peers=peers)
        async with running_service(main, own) as channel:
            yield Router(own, channel, nats_server)

    return started


@pytest.fixture
async def back_end() -> AsyncIterator[ScriptedBackEnd]:
    async with ScriptedBackEnd(Script()) as server:
        yield server


@pytest.fixture
async def router(start: Start, back_end: ScriptedBackEnd) -> AsyncIterator[Router]:
    async with start(model_urls=[back_end.url]) as running:
        yield running


@pytest.fixture
async def log(database: Database, nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[Log]:
    dsn = database.role_dsn("registry")
    client = await connect(nats_server.issuer.service("registry", tmp_path), "registry")
    # Without its hints the router would look once a second.
    async with await LogWriter.open(dsn, on_head=head_announcer(client)) as writer, LogReader(dsn) as reader:
        yield Log(writer, reader)
    await client.close()
