"""A push during which answers of the artifact store or of the log are lost."""

from collections.abc import Callable

import pytest
from hive_common.artifacts.package import AgentPackage
from hive_common.artifacts.store import FolderStore
from hive_common.kernel.errors import Unavailable
from hive_common.ops.config import ServiceConfig
from hive_common.rpc.client import call
from hive_common.testing.answers import AnswersLost
from hive_common.testing.fixtures import Database
from hive_common.testing.services import running_service
from hive_proto.agents.v1 import agents_pb2 as pb
from hive_registry.bootstrap import main

from .conftest import Registry

CALLS_MAX = 20


async def test_a_push_is_repeated_until_no_answer_of_the_store_is_lost_and_is_published_once(
    config: ServiceConfig,
    database: Database,
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
        registry = Registry(config, channel, database)
        packed = package()
        request = pb.PushRequest(manifest_digest=await registry.upload(packed))
        positions = []
        while not positions:
            assert spared < CALLS_MAX
            calls = 0
            try:
                answer = await call(registry.agents.Push(request, metadata=registry.key))
            except Unavailable:
                spared += 1
                positions = []
            else:
                positions.append(answer.position)
        # All blobs of the package were read, and the version was named.
        assert losing[0].lost.keys() == {"get", "tag"}
        assert spared == len(packed.blobs) + 1
        (event,) = await registry.events()
        assert (event.type, event.position) == ("AgentVersionPublished", positions[0])
        assert (await registry.store.tags())["square:1.0.0"].digest == packed.digest
