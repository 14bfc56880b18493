import msgspec
import psycopg
import pytest
from hive_common.contracts.events import (
    SCHEMA,
    ExecutorCapabilitiesChanged,
    ExecutorEnrolled,
    ExecutorRegistered,
    ExecutorRevoked,
    Model,
)
from hive_common.kernel.errors import InvalidArgument, Unauthenticated
from hive_common.kernel.ids import new_id
from hive_common.ops.config import ServiceConfig
from hive_common.ops.lifecycle import Stop
from hive_common.ops.ports import free_port
from hive_common.rpc.client import call
from hive_common.testing.fixtures import Database
from hive_common.testing.scripted import Script, ScriptedBackEnd
from hive_proto.models.v1 import models_pb2 as pb
from hive_router.bootstrap import main

from .conftest import Log, Start, capabilities

SMALL = Model(
    name="small", backend="ollama", family="llama", size_bytes=100, quantisation="Q4", context_tokens=2048
)
LARGE = Model(name="large", backend="llama.cpp", size_bytes=900)


def registered(*models: Model) -> ExecutorRegistered:
    return ExecutorRegistered(name="laptop", capabilities=capabilities(*models))


def changed(*models: Model) -> ExecutorCapabilitiesChanged:
    return ExecutorCapabilitiesChanged(capabilities=capabilities(*models))


async def test_models_are_listed_once_with_the_executors_that_serve_them(start: Start, log: Log) -> None:
    one, two = sorted([new_id(), new_id()])
    await log.add(one, registered(SMALL))
    await log.add(two, registered(LARGE, msgspec.structs.replace(SMALL, backend="llama.cpp", loaded=True)))
    async with start() as router:
        found = await router.models_once(lambda found: len(found) == 2)
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
        assert await router.models(limit=1) == found[:1]


async def test_what_an_executor_reports_later_replaces_what_it_said(start: Start, log: Log) -> None:
    executor, other = new_id(), new_id()
    async with start() as router:
        await log.add(executor, registered(SMALL, LARGE))
        await log.add(other, registered(SMALL))
        await router.models_once(lambda found: len(found) == 2 and len(found[1].executors) == 2)
        await log.add(executor, changed(LARGE))
        found = await router.models_once(lambda found: len(found[1].executors) == 1)
        assert [(model.name, list(model.executors)) for model in found] == [
            ("large", [executor]),
            ("small", [other]),
        ]
        await log.add(executor, changed())
        found = await router.models_once(lambda found: len(found) == 1)
        assert found[0].name == "small"
        await log.add(other, ExecutorRevoked())
        assert await router.models_once(lambda found: not found) == []


async def test_a_machine_that_joined_says_what_it_serves_after_it_was_enrolled(start: Start, log: Log) -> None:
    executor = new_id()
    await log.add(executor, ExecutorEnrolled(name="laptop", public_key="U", owner="somebody"), registered(SMALL))
    async with start() as router:
        found = await router.models_once(bool)
        assert [(one.name, list(one.executors)) for one in found] == [("small", [executor])]


async def test_executors_of_the_host_are_not_listed_again_as_devices_of_the_pool(start: Start, log: Log) -> None:
    on_host, other = new_id(), new_id()
    await log.add(on_host, registered(SMALL))
    await log.add(other, registered(LARGE))
    async with start(host_executors=[on_host]) as router:
        found = await router.models_once(bool)
        assert [one.name for one in found] == ["large"]


async def test_a_server_that_has_only_just_started_is_listed_before_the_next_look(start: Start) -> None:
    port = free_port()
    async with start(model_urls=[f"http://127.0.0.1:{port}"], refresh_ms=600_000) as router:
        assert await router.models() == []
        async with ScriptedBackEnd(Script(), port=port):
            found = await router.models_once(bool)
            assert [one.name for one in found] == ["scripted"]


async def test_the_view_goes_on_where_it_was_and_can_be_rebuilt(start: Start, log: Log, database: Database) -> None:
    executor = new_id()
    await log.add(executor, registered(LARGE), *(changed(SMALL) for _ in range(10)))
    async with start() as router:
        before = await router.models_once(lambda found: [one.name for one in found] == ["small"])
    async with start() as router:
        assert await router.models() == before
    async with await psycopg.AsyncConnection.connect(database.dsn, autocommit=True) as conn:
        await conn.execute("TRUNCATE router.executors")
        await conn.execute("DELETE FROM router.projections")
    async with start() as router:
        assert await router.models_once(bool) == before


@pytest.mark.parametrize(
    ("type_name", "schema"), [("ExecutorRegistered", SCHEMA + 1), ("ExecutorTeleported", SCHEMA)]
)
async def test_an_event_it_does_not_know_stops_the_router(
    config: ServiceConfig, log: Log, type_name: str, schema: int
) -> None:
    await log.append(new_id(), type_name, schema, b"{}")
    stop = Stop()
    await main(config, stop)
    assert stop.exit_code == 1
    assert type_name in stop.reason


async def test_limits_and_keys_are_checked(start: Start) -> None:
    async with start() as router:
        for limit in (-1, 1001):
            with pytest.raises(InvalidArgument, match="limit"):
                await router.models(limit)
        with pytest.raises(Unauthenticated):
            await call(router.stub.List(pb.ListRequest()))


@pytest.mark.parametrize(
    ("name", "value"), [("budget", b"1"), ("model_urls", b'["ftp://x"]'), ("weights", b'{"luck":1}')]
)
async def test_a_wrong_setting_is_refused_by_name(config: ServiceConfig, name: str, value: bytes) -> None:
    wrong = msgspec.structs.replace(config, extra={name: msgspec.Raw(value)})
    with pytest.raises(InvalidArgument, match=name):
        await main(wrong, Stop())
