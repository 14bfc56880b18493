import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import psycopg
import pytest
from hive_common.contracts.events import (
    SCHEMA,
    Capabilities,
    Event,
    ExecutorCapabilitiesChanged,
    ExecutorRegistered,
    Model,
    encode,
)
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.errors import InvalidArgument, Unauthenticated
from hive_common.kernel.ids import new_id
from hive_common.ops.config import ServiceConfig
from hive_common.ops.lifecycle import Stop
from hive_common.rpc.client import call
from hive_common.testing.fixtures import Database
from hive_common.testing.nats import EmbeddedNats
from hive_common.testing.services import key_of, running_service, service_config
from hive_proto.models.v1 import models_pb2 as pb
from hive_proto.models.v1 import models_pb2_grpc
from hive_router.bootstrap import main

SMALL = Model(
    name="small", backend="ollama", family="llama", size_bytes=100, quantisation="Q4", context_tokens=2048
)
LARGE = Model(name="large", backend="llama.cpp", size_bytes=900)


def capabilities(*models: Model) -> Capabilities:
    return Capabilities(os="linux", arch="x86_64", cores=1, memory_bytes=1, slots=1, runtimes=(), models=models)


class Log:
    """Executors as the registry would write them."""

    def __init__(self, writer: LogWriter) -> None:
        self._writer = writer
        self._versions: dict[str, int] = {}

    async def report(self, executor: str, *models: Model) -> int:
        known = executor in self._versions
        event: Event = (
            ExecutorCapabilitiesChanged(capabilities=capabilities(*models))
            if known
            else ExecutorRegistered(name="laptop", capabilities=capabilities(*models))
        )
        return await self.append(executor, type(event).__name__, SCHEMA, encode(event))

    async def append(self, executor: str, event_type: str, schema: int, payload: bytes) -> int:
        self._versions[executor] = version = self._versions.get(executor, 0) + 1
        event = NewEvent(
            stream=executor,
            version=version,
            type=event_type,
            schema=schema,
            payload=payload,
            ts_us=1,
            actor=executor,
            owner="owner",
        )
        return await self._writer.append(Append((event,)))


@pytest.fixture
def config(database: Database, nats_server: EmbeddedNats, tmp_path: Path) -> ServiceConfig:
    return service_config("router", database, nats_server, tmp_path)


@pytest.fixture
async def log(database: Database) -> AsyncIterator[Log]:
    async with await LogWriter.open(database.role_dsn("registry")) as writer:
        yield Log(writer)


async def models(config: ServiceConfig, channel: Any, limit: int = 0) -> list[pb.Model]:
    stub = models_pb2_grpc.ModelsStub(channel)
    return list((await call(stub.List(pb.ListRequest(limit=limit), metadata=key_of(config)))).models)


async def models_once(
    config: ServiceConfig, channel: Any, until: Callable[[list[pb.Model]], bool]
) -> list[pb.Model]:
    """The view follows the log; ask until it has what the test wrote. The test's timeout bounds it."""
    while not until(found := await models(config, channel)):
        await asyncio.sleep(0.02)
    return found


async def test_models_are_listed_once_with_the_executors_that_serve_them(config: ServiceConfig, log: Log) -> None:
    one, two = sorted([new_id(), new_id()])
    await log.report(one, SMALL)
    await log.report(two, LARGE, msgspec.structs.replace(SMALL, backend="llama.cpp", loaded=True))
    async with running_service(main, config) as channel:
        found = await models_once(config, channel, lambda found: len(found) == 2)
        assert found == [
            pb.Model(name="large", executors=[two], size_bytes=900),
            pb.Model(
                name="small",
                executors=[one, two],
                family="llama",
                size_bytes=100,
                quantisation="Q4",
                context_tokens=2048,
                loaded=True,
            ),
        ]
        assert await models(config, channel, limit=1) == found[:1]


async def test_what_an_executor_reports_later_replaces_what_it_said(config: ServiceConfig, log: Log) -> None:
    executor, other = new_id(), new_id()
    async with running_service(main, config) as channel:
        await log.report(executor, SMALL, LARGE)
        await log.report(other, SMALL)
        await models_once(config, channel, lambda found: len(found) == 2 and len(found[1].executors) == 2)
        await log.report(executor, LARGE)
        found = await models_once(config, channel, lambda found: len(found[1].executors) == 1)
        assert [(model.name, list(model.executors)) for model in found] == [
            ("large", [executor]),
            ("small", [other]),
        ]
        await log.report(executor)
        found = await models_once(config, channel, lambda found: len(found) == 1)
        assert found[0].name == "small"


async def test_many_reports_in_one_batch_end_with_the_last(config: ServiceConfig, log: Log) -> None:
    executor = new_id()
    for size in range(1, 30):
        await log.report(executor, msgspec.structs.replace(SMALL, size_bytes=size))
    await log.report(executor, LARGE, LARGE)
    async with running_service(main, config) as channel:
        found = await models_once(config, channel, bool)
        assert [model.name for model in found] == ["large"]


async def test_the_view_goes_on_where_it_was_and_can_be_rebuilt(
    config: ServiceConfig, log: Log, database: Database
) -> None:
    await log.report(new_id(), SMALL)
    async with running_service(main, config) as channel:
        before = await models_once(config, channel, bool)
    async with running_service(main, config) as channel:
        assert await models(config, channel) == before
    async with await psycopg.AsyncConnection.connect(database.dsn, autocommit=True) as conn:
        await conn.execute("TRUNCATE router.executor_models")
        await conn.execute("DELETE FROM router.projections")
    async with running_service(main, config) as channel:
        assert await models_once(config, channel, bool) == before


@pytest.mark.parametrize(("type_name", "schema"), [("ExecutorRegistered", SCHEMA + 1), ("ExecutorRevoked", SCHEMA)])
async def test_an_event_it_does_not_know_stops_the_router(
    config: ServiceConfig, log: Log, type_name: str, schema: int
) -> None:
    await log.append(new_id(), type_name, schema, b"{}")
    stop = Stop()
    await main(config, stop)
    assert stop.exit_code == 1
    assert type_name in stop.reason


async def test_limits_and_keys_are_checked(config: ServiceConfig) -> None:
    async with running_service(main, config) as channel:
        for limit in (-1, 1001):
            with pytest.raises(InvalidArgument, match="limit"):
                await models(config, channel, limit)
        with pytest.raises(Unauthenticated):
            await call(models_pb2_grpc.ModelsStub(channel).List(pb.ListRequest()))


async def test_an_unknown_setting_is_refused(config: ServiceConfig) -> None:
    wrong = msgspec.structs.replace(config, extra={"budget": msgspec.Raw(b"1")})
    with pytest.raises(InvalidArgument, match="budget"):
        await main(wrong, Stop())
