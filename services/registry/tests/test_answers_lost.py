"""A push during which answers of the artifact store are lost, and a hello whose own answer is."""

import contextlib
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hive_common.artifacts.package import AgentPackage
from hive_common.artifacts.store import FolderStore
from hive_common.bus.nats import connect, request
from hive_common.contracts.messages import HelloReply, HelloRequest, hello_subject, inbox_prefix
from hive_common.kernel.errors import DeadlineExceeded, Unavailable
from hive_common.ops.config import ServiceConfig
from hive_common.rpc.client import call
from hive_common.testing.answers import AnswersLost
from hive_common.testing.fixtures import Database, NatsServer
from hive_common.testing.proxy import TcpProxy
from hive_common.testing.services import running_service
from hive_common.testing.wire import nats_answered
from hive_proto.agents.v1 import agents_pb2 as pb
from hive_registry.bootstrap import main

from .conftest import CAPABILITIES, Registry

CALLS_MAX = 20


async def test_a_push_is_repeated_until_no_answer_of_the_store_is_lost_and_is_published_once(
    config: ServiceConfig,
    database: Database,
    nats_server: NatsServer,
    package: Callable[..., AgentPackage],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each of the store's answers that a push needs is lost once, those before the event and the one behind it."""
    losing: list[AnswersLost] = []
    spared = 0
    calls = 0

    def loses(name: str, count: int) -> bool:
        nonlocal calls
        calls += 1
        return calls > spared

    def open_store(root: str) -> AnswersLost:
        losing.append(AnswersLost(FolderStore(root), loses))
        return losing[0]

    monkeypatch.setattr("hive_registry.bootstrap.FolderStore", open_store)
    async with running_service(main, config) as channel:
        registry = Registry(config, channel, database, nats_server)
        packed = package()
        digest = await registry.upload(packed)
        signature = await registry.signed(digest)
        request = pb.PushRequest(manifest_digest=digest, signature_digest=signature.digest)
        positions: list[int] = []
        while not positions:
            assert spared < CALLS_MAX
            calls = 0
            try:
                answer = await call(registry.agents.Push(request, metadata=registry.key))
            except Unavailable:
                spared += 1
                positions: list[int] = []
            else:
                positions.append(answer.position)
        # All blobs of signature and package were read, two of them twice, and both were named.
        assert losing[0].lost.keys() == {"get", "tag"}
        assert spared == len(packed.blobs) + len(signature.blobs) + 2 + 2
        (event,) = await registry.events()
        assert (event.type, event.position) == ("AgentVersionPublished", positions[0])
        assert (await registry.store.tags())["square:1.0.0"].digest == packed.digest


async def test_a_hello_whose_answer_is_lost_is_said_again_and_registers_once(
    config: ServiceConfig, database: Database, nats_server: NatsServer, tmp_path: Path
) -> None:
    async with running_service(main, config) as channel, TcpProxy(nats_server.port) as proxy:
        registry = Registry(config, channel, database, nats_server)
        executor = await registry.joined()
        through = msgspec.structs.replace(
            nats_server.issuer.executor(executor, tmp_path), url=f"nats://127.0.0.1:{proxy.port}"
        )
        client = await connect(through, executor, inbox=inbox_prefix(executor))
        body = HelloRequest(name="laptop", session="s", capabilities=CAPABILITIES)
        cut = proxy.cut_next_answer(nats_answered)
        replies: list[HelloReply] = []
        for _ in range(CALLS_MAX):
            with contextlib.suppress(DeadlineExceeded, Unavailable):
                replies.append(await request(client, hello_subject(executor), body, HelloReply, 2.0))
                break
        assert cut.is_set()
        (event,) = await registry.events()
        assert (event.stream, event.type) == (executor, "ExecutorRegistered")
        assert replies and replies[0].error is None
        await client.close()
