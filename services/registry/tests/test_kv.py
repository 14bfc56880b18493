"""Values that agents keep, at the registry: read over NATS, staged by attempts, decided by the log."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partialmethod
from typing import Any

import msgspec
import psycopg
import pytest
from hive_common.bus.nats import connect, request
from hive_common.contracts.events import (
    SCHEMA,
    AttemptFailed,
    AttemptLost,
    AttemptSucceeded,
    Event,
    KvStaged,
    KvWrite,
    TaskCancelled,
    TaskDecided,
    TaskFailed,
    TaskSucceeded,
    decode,
    encode,
)
from hive_common.contracts.judgement import Decision, Rule
from hive_common.contracts.limits import MIB
from hive_common.contracts.messages import KvReply, KvRequest, call_subject, inbox_prefix
from hive_common.contracts.permissions import HttpPermission, KvPermission, Permissions
from hive_common.contracts.values import inline
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import InvalidArgument, NotFound, PermissionDenied
from hive_common.kernel.ids import new_id
from hive_common.ops.config import ServiceConfig
from hive_common.permissions.actions import kv_list_action, kv_read_action, kv_write_action
from hive_common.permissions.tokens import Claims, Minter, new_key, public_key
from hive_common.rpc.client import call
from hive_common.testing.fixtures import Database, NatsServer
from hive_common.testing.services import running_service
from hive_proto.values.v1 import values_pb2, values_pb2_grpc
from hive_registry.bootstrap import main
from hive_registry.kv import KvDesk
from nats.aio.client import Client

from .conftest import Registry

ROOT = new_key()
EXECUTOR = new_id()
FAR_US = SystemClock().now_us() + 3_600_000_000


def token(
    task: str,
    attempt: int = 1,
    *,
    executor: str = EXECUTOR,
    namespace: str = "notes",
    quota: int = MIB,
    **more: Any,
) -> str:
    claims = Claims(
        executor=executor,
        key="",
        job=new_id(),
        task=task,
        attempt=attempt,
        permissions=Permissions(kv=KvPermission(namespace, quota)),
        expires_us=FAR_US,
    )
    return Minter(more.pop("root", ROOT)).mint(msgspec.structs.replace(claims, **more))


def put(key: str, value: Any) -> KvWrite:
    return KvWrite(key, msgspec.Raw(msgspec.json.encode(value)))


class Kv:
    """An executor that asks, and a scheduler that decides."""

    def __init__(self, client: Client, registry: Registry, database: Database, owner: str) -> None:
        self.registry = registry
        self._client = client
        self._database = database
        self._owner = owner

    async def ask(self, op: str, token: str, namespace: str = "notes", **more: Any) -> KvReply:
        body = KvRequest(op=op, token=token, namespace=namespace, **more)
        return await request(self._client, call_subject(EXECUTOR, "kv"), body, KvReply, 20)

    async def get(self, key: str, namespace: str = "notes") -> Any:
        """Return a value as a later task finds it; ... for none."""
        reply = await self.ask("get", token(new_id(), namespace=namespace), namespace, key=key)
        assert reply.error is None, reply
        return ... if isinstance(reply.value, msgspec.UnsetType) else msgspec.json.decode(reply.value)

    async def stage(self, task: str, *writes: KvWrite, attempt: int = 1, **more: Any) -> str:
        """Return the code of the refusal, empty where it was taken."""
        reply = await self.ask("stage", token(task, attempt, **more), writes=writes)
        return reply.error.code if reply.error else ""

    async def log(self, task: str, *events: Event, after: int = 0) -> None:
        """Write events of a task, which has so many already."""
        new = tuple(
            NewEvent(task, version, type(event).__name__, SCHEMA, encode(event), 1, "scheduler", self._owner)
            for version, event in enumerate(events, start=after + 1)
        )
        async with await LogWriter.open(self._database.role_dsn("scheduler")) as writer:
            await writer.append(Append(new))

    async def staged(self) -> list[KvStaged]:
        found = [event for event in await self.registry.events() if event.type == "KvStaged"]
        decoded = [decode(event.type, event.schema, event.payload or b"") for event in found]
        return [event for event in decoded if isinstance(event, KvStaged)]


@pytest.fixture
def kv_config(config: ServiceConfig) -> ServiceConfig:
    return msgspec.structs.replace(config, token_public_key=public_key(ROOT))


@asynccontextmanager
async def registry_of(config: ServiceConfig, database: Database, nats_server: NatsServer) -> AsyncIterator[Kv]:
    async with running_service(main, config) as channel:
        registry = Registry(config, channel, database, nats_server)
        client = await connect(registry.nats_of(EXECUTOR), EXECUTOR, inbox=inbox_prefix(EXECUTOR))
        try:
            yield Kv(client, registry, database, config.owner)
        finally:
            await client.close()
            await registry.close()


@pytest.fixture
async def kv(kv_config: ServiceConfig, database: Database, nats_server: NatsServer) -> AsyncIterator[Kv]:
    async with registry_of(kv_config, database, nats_server) as kv:
        yield kv


async def test_what_an_attempt_wrote_is_there_when_it_decides_its_task_and_not_before(kv: Kv) -> None:
    task = new_id()
    assert await kv.stage(task, put("a", {"n": 1}), put("b", None), KvWrite("gone")) == ""
    assert [await kv.get(key) for key in "ab"] == [..., ...]
    await kv.log(task, TaskSucceeded(1))
    assert [await kv.get(key) for key in ("a", "b", "gone")] == [{"n": 1}, None, ...]
    second = new_id()
    assert await kv.stage(second, KvWrite("a"), put("b", 2)) == ""
    await kv.log(second, TaskSucceeded(1))
    assert [await kv.get(key) for key in "ab"] == [..., 2]


@pytest.mark.parametrize(
    "end",
    [
        (TaskFailed("agent_error"),),
        (TaskCancelled("x"),),
        (AttemptLost(1, "lease"), TaskSucceeded(2)),
        (AttemptFailed(1, "timeout"), TaskSucceeded(2)),
        (TaskSucceeded(2),),
    ],
    ids=["failed", "cancelled", "lost", "attempt failed", "another attempt"],
)
async def test_of_an_attempt_that_does_not_decide_its_task_nothing_is_kept(kv: Kv, end: tuple[Event, ...]) -> None:
    task = new_id()
    assert await kv.stage(task, put("a", 1), put("b", 1)) == ""
    if end[-1] == TaskSucceeded(2):
        assert await kv.stage(task, put("a", 2), attempt=2) == ""
    await kv.log(task, *end)
    assert await kv.get("b") == ...
    assert await kv.get("a") == (2 if end[-1] == TaskSucceeded(2) else ...)
    # And it holds no room: the whole quota is there for somebody else.
    assert await kv.stage(new_id(), put("c", "x" * 900), quota=1000) == ""


async def test_of_replicas_the_one_that_is_chosen_is_kept_and_nothing_before_it_is(kv: Kv) -> None:
    task, attempts = new_id(), (1, 2, 3)
    for attempt in attempts:
        assert await kv.stage(task, put("a", attempt), put(f"of-{attempt}", 1), attempt=attempt) == ""
    succeeded = [AttemptSucceeded(attempt, inline(b"42")) for attempt in attempts]
    await kv.log(task, *succeeded)
    # Each of them has succeeded, and none is decided on.
    assert [await kv.get(key) for key in ("a", "of-1", "of-2", "of-3")] == [...] * 4
    await kv.log(
        task,
        TaskDecided(Decision(1, task, Rule(k=2, of=3), "decided", winner=2, votes=(2, 3))),
        TaskSucceeded(2),
        after=3,
    )
    assert [await kv.get(key) for key in ("a", "of-1", "of-2", "of-3")] == [2, ..., 1, ...]
    # Nor do the others hold room.
    assert await kv.stage(new_id(), put("c", "x" * 900), quota=1000) == ""


async def test_the_same_twice_is_one_event_and_something_else_is_refused(kv: Kv) -> None:
    task = new_id()
    assert [await kv.stage(task, put("a", 1)) for _ in range(3)] == ["", "", ""]
    assert await kv.stage(task, put("a", 2)) == "conflict"
    ((event),) = await kv.staged()
    assert (event.task, event.attempt, event.writes) == (task, 1, (put("a", 1),))


async def test_what_comes_after_the_end_of_its_attempt_is_refused(kv: Kv) -> None:
    for end in (TaskSucceeded(1), TaskFailed("timeout"), AttemptLost(1, "lease"), AttemptFailed(1, "trap")):
        task = new_id()
        await kv.log(task, end)
        assert await kv.stage(task, put("a", 1)) == "failed_precondition"
    # The second attempt is not over when the first one is.
    assert await kv.stage(task, put("a", 1), attempt=2) == ""
    assert await kv.get("a") == ...


async def test_an_end_between_the_look_at_the_task_and_the_write_is_seen(
    kv: Kv, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, check = new_id(), KvDesk._check_live

    async def ends_meanwhile(desk: KvDesk, claims: Claims) -> int:
        version = await check(desk, claims)
        if not await kv.registry.events():
            await kv.log(task, TaskFailed("timeout"))
        return version

    monkeypatch.setattr(KvDesk, "_check_live", ends_meanwhile)
    assert await kv.stage(task, put("a", 1)) == "failed_precondition"
    assert await kv.staged() == []


async def test_without_a_token_for_that_namespace_nothing_is_read_or_written(kv: Kv) -> None:
    task = new_id()
    assert await kv.stage(task, put("a", "secret")) == ""
    await kv.log(task, TaskSucceeded(1))
    tokens = {
        "none": "",
        "nonsense": "abc",
        "another installation's": token(task, root=new_key()),
        "another executor's": token(task, executor=new_id()),
        "another namespace's": token(task, namespace="other"),
        "without kv": token(task, permissions=Permissions(http=HttpPermission(("a.test",)))),
        "run out": token(task, expires_us=1),
    }
    for name, shown in tokens.items():
        for op, more in (("get", {"key": "a"}), ("list", {"limit": 9}), ("stage", {"writes": (put("a", 1),)})):
            reply = await kv.ask(op, shown, **more)
            assert reply.error is not None, name
            assert reply.error.code == "permission_denied", name
            assert "secret" not in repr(reply)
    named = await kv.ask("get", token(task, namespace="other"), key="a")
    assert named.error is not None
    assert "`kv` is granted for other, not for 'notes'" in named.error.message
    assert len(await kv.staged()) == 1


async def test_namespaces_are_apart(kv: Kv) -> None:
    task = new_id()
    reply = await kv.ask("stage", token(task, namespace="other"), "other", writes=(put("a", 1),))
    assert reply.error is None
    await kv.log(task, TaskSucceeded(1))
    assert (await kv.get("a", "other"), await kv.get("a")) == (1, ...)


async def test_keys_come_in_pages_in_order(kv: Kv) -> None:
    task = new_id()
    await kv.stage(task, *(put(key, 1) for key in ("b/2", "b/10", "a", "b/1", "c")))
    await kv.log(task, TaskSucceeded(1))
    found: list[str] = []
    while True:
        reply = await kv.ask("list", token(task), prefix="b/", after=found[-1] if found else "", limit=2)
        found += reply.keys
        if not reply.more:
            break
    assert found == ["b/1", "b/10", "b/2"]


async def test_the_quota_counts_what_is_kept_and_what_may_come(kv: Kv) -> None:
    first, second = new_id(), new_id()
    assert await kv.stage(first, put("a", "x" * 597), quota=1000) == ""
    assert await kv.stage(second, put("b", "x" * 597), quota=1000) == "budget_exhausted"
    await kv.log(first, TaskSucceeded(1))
    assert await kv.stage(second, put("b", "x" * 597), quota=1000) == "budget_exhausted"
    assert await kv.stage(second, KvWrite("a"), put("b", "x" * 597), quota=1000) == ""


async def test_requests_that_are_none_are_refused(kv: Kv) -> None:
    good = token(new_id())
    for op, more in (
        ("drop", {}),
        ("get", {"key": ""}),
        ("get", {"key": "a b"}),
        ("list", {"limit": 0}),
        ("list", {"limit": 1001}),
        ("list", {"limit": 1, "prefix": "%"}),
        ("stage", {}),
        ("stage", {"writes": (put("a", 1), put("a", 2))}),
        ("get", {"key": "a", "v": 2}),
    ):
        reply = await kv.ask(op, good, **more)
        assert reply.error is not None, (op, more)
        assert reply.error.code == "invalid_argument"


async def test_the_owner_sees_and_removes_what_agents_keep(kv: Kv) -> None:
    stub, key = values_pb2_grpc.ValuesStub(kv.registry.channel), kv.registry.key

    async def get(name: str) -> bytes:
        request = values_pb2.GetRequest(namespace="notes", key=name)
        return (await call(stub.Get(request, metadata=key))).value

    async def keys(**more: Any) -> values_pb2.Page:
        return await call(stub.List(values_pb2.ListRequest(namespace="notes", **more), metadata=key))

    async def delete(name: str) -> None:
        request = values_pb2.DeleteRequest(namespace="notes", key=name, caller="ada")
        await call(stub.Delete(request, metadata=key))

    assert not (await keys()).keys
    task = new_id()
    await kv.stage(task, put("a/1", [1, None]), put("a/2", 2), put("b", 3))
    assert not (await keys()).keys
    await kv.log(task, TaskSucceeded(1))
    assert await get("a/1") == b"[1,null]"
    page = await keys(prefix="a/", limit=1)
    assert (list(page.keys), page.more) == (["a/1"], True)
    assert list((await keys(prefix="a/", after="a/1")).keys) == ["a/2"]
    await delete("a/1")
    await delete("a/1")
    with pytest.raises(NotFound):
        await get("a/1")
    assert await kv.get("a/1") == ...
    events = [event for event in await kv.registry.events() if event.type == "KvStaged"]
    assert [event.actor for event in events] == [EXECUTOR, "ada"]
    for namespace in ("", "A", "a b", "x" * 64):
        with pytest.raises(InvalidArgument, match="namespace"):
            await call(stub.Get(values_pb2.GetRequest(namespace=namespace, key="a"), metadata=key))


@pytest.mark.parametrize(("batch", "ends_max"), [(1, 1), (2, 3), (1000, 10_000)])
async def test_a_view_that_is_made_anew_from_the_log_is_the_same(
    kv_config: ServiceConfig,
    database: Database,
    nats_server: NatsServer,
    monkeypatch: pytest.MonkeyPatch,
    batch: int,
    ends_max: int,
) -> None:
    async def dump() -> list[Any]:
        found = []
        for table in ("kv_values", "kv_staged", "kv_streams"):
            found += await (await conn.execute(f"SELECT * FROM registry.{table} ORDER BY 1, 2, 3")).fetchall()
        return found

    tasks = [new_id() for _ in range(4)]
    # As little at a time as it can be: every event is a boundary.
    monkeypatch.setattr("hive_registry.kv_source.READ_EVENTS_MAX", ends_max)
    monkeypatch.setattr(ProjectionRunner, "__init__", partialmethod(ProjectionRunner.__init__, batch_events=batch))
    async with await psycopg.AsyncConnection.connect(database.role_dsn("registry"), autocommit=True) as conn:
        async with registry_of(kv_config, database, nats_server) as kv:
            for number, task in enumerate(tasks):
                assert await kv.stage(task, put("last", number), put(f"of/{number}", number)) == ""
            # Decided in another order than staged; one is still open, one is lost.
            for number in (2, 0):
                await kv.log(tasks[number], TaskSucceeded(1))
            await kv.log(tasks[1], AttemptLost(1, "lease"))
            assert await kv.get("last") == 0
        before = await dump()
        assert [row[2] for row in before] == ["last", "of/0", "of/2", 1, before[-1][2]]
        await conn.execute("TRUNCATE registry.kv_values, registry.kv_staged, registry.kv_streams")
        await conn.execute("UPDATE registry.projections SET position = 0 WHERE name = 'registry_kv'")
        async with registry_of(kv_config, database, nats_server) as kv:
            assert await kv.get("last") == 0
        assert await dump() == before


async def test_where_a_person_is_asked_only_what_was_approved_is_read_or_staged(kv: Kv) -> None:
    asking = Permissions(kv=KvPermission("notes", MIB), asks=("kv",))
    task, agent = new_id(), "a@1.0.0"
    approved = (
        kv_read_action(agent, "notes", "a").hash,
        kv_list_action(agent, "notes", "b/").hash,
        kv_write_action(agent, "notes", put("a", 1)).hash,
        kv_write_action(agent, "notes", KvWrite("b")).hash,
    )

    async def refused(op: str, hashes: tuple[str, ...] = approved, agent: str = agent, **more: Any) -> str:
        shown = token(task, permissions=asking, agent=agent, approved=hashes)
        reply = await kv.ask(op, shown, **more)
        if reply.error is None:
            return ""
        assert reply.error.fields["permission"] == "kv"
        return reply.error.code

    denied = PermissionDenied.code
    assert await refused("get", key="b") == await refused("get", (), key="a") == denied
    assert await refused("get", key="a", agent="b@1.0.0") == denied
    assert await refused("list", prefix="", limit=2) == denied
    # One write that nobody approved of, and none of them is staged.
    for other in (put("a", 2), put("c", 1), KvWrite("a")):
        assert await refused("stage", writes=(put("a", 1), other)) == denied
    assert not await kv.staged()
    assert await refused("get", key="a") == await refused("list", prefix="b/", after="b/1", limit=2) == ""
    assert await refused("stage", writes=(put("a", 1), KvWrite("b"))) == ""
    assert len(await kv.staged()) == 1
