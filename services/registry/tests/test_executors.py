import asyncio
from collections.abc import Callable
from typing import Any

import grpc.aio
import msgspec
import psycopg
import pytest
from hive_common.artifacts.keys import public_hex
from hive_common.artifacts.package import AgentPackage
from hive_common.bus.nats import connect, request
from hive_common.contracts.events import Capabilities, Power
from hive_common.contracts.messages import HelloReply, HelloRequest, hello_subject, inbox_prefix
from hive_common.kernel.errors import (
    Conflict,
    DeadlineExceeded,
    FailedPrecondition,
    InvalidArgument,
    NotFound,
    Unauthenticated,
)
from hive_common.kernel.ids import new_id
from hive_common.ops.config import ServiceConfig
from hive_common.ops.ports import free_port
from hive_common.rpc.client import bearer, call
from hive_common.rpc.server import RpcServer, key_check
from hive_common.testing.fixtures import Database, NatsServer
from hive_common.testing.identities import EVERYTHING
from hive_common.testing.services import key_of, running_service
from hive_proto.agents.v1 import agents_pb2
from hive_proto.executors.v1 import executors_pb2 as pb
from hive_proto.executors.v1 import executors_pb2_grpc
from hive_registry.bootstrap import main

from .conftest import AUTHOR, CAPABILITIES, Registry


async def test_a_hello_is_in_the_log_and_in_the_list_before_it_is_answered(registry: Registry) -> None:
    executor = await registry.joined()
    reply = await registry.hello(executor, "laptop")
    assert reply == HelloReply(
        position=4,
        blobs_url="http://127.0.0.1:8500",
        drained=False,
        signers=(public_hex(AUTHOR),),
        signers_position=2,
    )
    (event,) = await registry.events()
    assert (event.position, event.stream, event.version, event.type) == (4, executor, 2, "ExecutorRegistered")
    assert (event.actor, event.owner, event.ns) == (executor, registry.config.owner, "default")
    (listed,) = (await call(registry.executors.List(pb.ListRequest(), metadata=registry.key))).executors
    assert (listed.executor_id, listed.name, listed.slots, listed.position) == (executor, "laptop", 4, 4)
    assert listed.state == "unknown"
    assert listed.last_seen_us >= listed.registered_us == event.ts_us
    assert msgspec.json.decode(listed.capabilities_json, type=Capabilities) == CAPABILITIES


async def test_only_a_hello_that_says_something_new_is_an_event(registry: Registry) -> None:
    executor = await registry.joined()
    assert (await registry.hello(executor)).position == 4
    assert (await registry.hello(executor)).position == 4
    assert (await registry.hello(executor, slots=8)).position == 5
    assert (await registry.hello(executor, slots=8, power=Power(battery_percent=80))).position == 6
    assert (await registry.hello(executor, slots=8, power=Power(battery_percent=75))).position == 6
    assert [event.type for event in await registry.events()] == [
        "ExecutorRegistered",
        "ExecutorCapabilitiesChanged",
        "ExecutorCapabilitiesChanged",
    ]
    got = await call(registry.executors.Get(pb.GetRequest(executor_id=executor), metadata=registry.key))
    assert (got.slots, got.position) == (8, 6)


async def test_hellos_of_one_executor_at_the_same_time_register_it_once(registry: Registry) -> None:
    executor = await registry.joined()
    await registry.hello(await registry.joined())
    replies = await asyncio.gather(*(registry.hello(executor) for _ in range(10)))
    assert {reply.position for reply in replies} == {6}
    assert len(await registry.events()) == 2


async def test_a_thousand_executors_may_come_at_once(registry: Registry) -> None:
    client = await connect(registry.nats_of(EVERYTHING), "crowd")
    waiting: dict[str, asyncio.Future[HelloReply]] = {}

    async def answered(message: Any) -> None:
        waiting[message.subject.split(".")[1]].set_result(msgspec.json.decode(message.data, type=HelloReply))

    await client.subscribe("_INBOX.*.hello", cb=answered)
    body = msgspec.json.encode(HelloRequest(name="device", session="s", capabilities=CAPABILITIES))
    crowd = [new_id() for _ in range(1000)]
    head = await registry.enrol(crowd)
    for executor in crowd:
        waiting[executor] = asyncio.get_running_loop().create_future()
        await client.publish(hello_subject(executor), body, reply=f"{inbox_prefix(executor)}.hello")
    replies = await asyncio.gather(*waiting.values())
    assert sorted(reply.position for reply in replies) == list(range(head + 1, head + 1001))
    first = await call(registry.executors.List(pb.ListRequest(limit=600), metadata=registry.key))
    rest = await call(
        registry.executors.List(
            pb.ListRequest(limit=600, after=first.executors[-1].executor_id), metadata=registry.key
        )
    )
    assert [e.executor_id for e in (*first.executors, *rest.executors)] == sorted(waiting)
    await client.close()


@pytest.mark.parametrize(
    ("name", "changes"), [("", {}), ("laptop", {"cores": -1}), ("laptop", {"os": "\x00"}), ("a" * 200, {})]
)
async def test_a_hello_beyond_its_bounds_is_refused_and_leaves_nothing(
    registry: Registry, name: str, changes: dict[str, Any]
) -> None:
    reply = await registry.hello(await registry.joined(), name, **changes)
    assert reply.error is not None
    assert reply.error.code == "invalid_argument"
    assert await registry.events() == []


async def test_a_hello_of_a_newer_version_or_of_no_executor_is_refused(registry: Registry) -> None:
    executor = new_id()
    client = await connect(registry.nats_of(executor), "x", inbox=inbox_prefix(executor))
    newer = HelloRequest(v=2, name="laptop", session="s", capabilities=CAPABILITIES)
    reply = await request(client, hello_subject(executor), newer, HelloReply, 20)
    assert reply.error is not None
    assert reply.error.message == "v: got 2; expected 1"
    await client.close()
    reply = await registry.hello("someone")
    assert reply.error is not None
    assert await registry.events() == []


async def test_a_hello_that_wants_its_answer_elsewhere_changes_nothing(registry: Registry) -> None:
    other = await connect(registry.nats_of(EVERYTHING), "x", inbox=inbox_prefix(new_id()))
    body = HelloRequest(name="laptop", session="s", capabilities=CAPABILITIES)
    with pytest.raises(DeadlineExceeded):
        await request(other, hello_subject(await registry.joined()), body, HelloReply, 0.5)
    assert await registry.events() == []
    await other.close()


async def test_a_drained_executor_is_told_so_until_it_is_taken_back(registry: Registry) -> None:
    executor = await registry.joined()
    await registry.hello(executor, "laptop")
    key = (*registry.key, ("hive-caller", "caller-1"))
    for _ in range(2):
        drained = await call(
            registry.executors.Drain(pb.DrainRequest(executor_id="laptop", reason="update"), metadata=key)
        )
        assert drained.state == "drained"
    assert (await registry.hello(executor)).drained
    for _ in range(2):
        back = await call(
            registry.executors.Drain(pb.DrainRequest(executor_id=executor, undrain=True), metadata=key)
        )
        assert back.state == "unknown"
    assert not (await registry.hello(executor)).drained
    events = (await registry.events())[1:]
    assert [(event.type, event.actor) for event in events] == [
        ("ExecutorDrainRequested", "caller-1"),
        ("ExecutorUndrained", "caller-1"),
    ]


async def test_a_person_trusts_an_executor_anew_and_says_why(registry: Registry) -> None:
    executor = await registry.joined()
    await registry.hello(executor, "laptop")
    key = (*registry.key, ("hive-caller", "caller-1"))
    told = await call(registry.executors.Trust(pb.TrustRequest(executor_id="laptop", reason="fixed"), metadata=key))
    assert not told.HasField("reputation"), "nobody is there who could tell"
    event = (await registry.events())[-1]
    assert (event.type, event.stream, event.actor, event.position) == (
        *("ExecutorTrusted", executor, "caller-1"),
        told.position,
    )
    # What is written after it has to have the version after it.
    await call(registry.executors.Drain(pb.DrainRequest(executor_id=executor), metadata=key))
    with pytest.raises(NotFound):
        await call(registry.executors.Trust(pb.TrustRequest(executor_id="desktop"), metadata=key))
    await call(registry.executors.Revoke(pb.RevokeRequest(executor_id=executor), metadata=key))
    with pytest.raises(FailedPrecondition):
        await call(registry.executors.Trust(pb.TrustRequest(executor_id=executor), metadata=key))


async def test_the_gateway_says_who_called_and_a_request_cannot_say_otherwise(registry: Registry) -> None:
    await registry.hello(await registry.joined(), "laptop")
    key = (*registry.key, ("hive-caller", "caller-1"))
    request = pb.DrainRequest(executor_id="laptop", caller="somebody-else")
    await call(registry.executors.Drain(request, metadata=key))
    assert (await registry.events())[-1].actor == "caller-1"
    with pytest.raises(InvalidArgument, match="caller"):
        await call(
            registry.executors.Drain(
                pb.DrainRequest(executor_id="laptop", undrain=True, caller="Ada Lovelace, London"),
                metadata=registry.key,
            )
        )


async def test_an_executor_that_is_not_there_is_named_with_the_nearest(registry: Registry) -> None:
    await registry.hello(await registry.joined(), "laptop")
    for wrong in ("lapptop", new_id(), "\x00"):
        with pytest.raises(NotFound) as error:
            await call(registry.executors.Get(pb.GetRequest(executor_id=wrong), metadata=registry.key))
        if wrong == "lapptop":
            assert "the nearest is laptop" in error.value.message
    with pytest.raises(InvalidArgument):
        await call(registry.executors.Get(pb.GetRequest(), metadata=registry.key))


async def test_a_name_that_two_executors_have_does_not_say_which(registry: Registry) -> None:
    for _ in range(2):
        await registry.hello(await registry.joined(), "laptop")
    with pytest.raises(Conflict, match="several"):
        await call(registry.executors.Get(pb.GetRequest(executor_id="laptop"), metadata=registry.key))


@pytest.mark.parametrize(
    "request_", [pb.ListRequest(limit=-1), pb.ListRequest(limit=1001), pb.ListRequest(after="x")]
)
async def test_lists_are_bounded(registry: Registry, request_: pb.ListRequest) -> None:
    with pytest.raises(InvalidArgument):
        await call(registry.executors.List(request_, metadata=registry.key))


async def test_every_call_needs_the_key(registry: Registry) -> None:
    for metadata in ((), bearer("wrong")):
        with pytest.raises(Unauthenticated):
            await call(registry.executors.List(pb.ListRequest(), metadata=metadata))


class Scheduler(executors_pb2_grpc.PresenceServicer):
    """Stands in for the scheduler's leader: answers what the test says."""

    def __init__(self) -> None:
        self.present: list[pb.Present] = []
        self.min_position = 0
        self.agents_of = ""

    async def List(
        self, request: pb.PresenceRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> pb.PresenceResponse:
        self.min_position, self.agents_of = request.min_position, request.agents_of
        return pb.PresenceResponse(executors=self.present)


async def test_presence_comes_from_the_scheduler_and_is_unknown_without_it(
    config: ServiceConfig, database: Database, nats_server: NatsServer, package: Callable[..., AgentPackage]
) -> None:
    port = free_port()
    config = msgspec.structs.replace(config, peers={"scheduler": f"127.0.0.1:{port}"})
    async with running_service(main, config) as channel:
        registry = Registry(config, channel, database, nats_server)
        pulls, silent, gone = sorted(new_id() for _ in range(3))
        await registry.enrol((pulls, silent, gone))
        for executor in (pulls, silent, gone):
            await registry.hello(executor)

        async def states() -> list[tuple[str, int]]:
            answer = await call(registry.executors.List(pb.ListRequest(), metadata=registry.key))
            return [(executor.state, executor.running) for executor in answer.executors]

        assert await states() == [("unknown", 0)] * 3
        scheduler = Scheduler()
        server = RpcServer("127.0.0.1", port, key_check(key_of(config)[0][1].removeprefix("Bearer ")))
        executors_pb2_grpc.add_PresenceServicer_to_server(scheduler, server.server)
        await server.start()
        scheduler.present = [
            pb.Present(
                executor_id=pulls,
                online=True,
                running=3,
                last_seen_us=2**62,
                reputation=pb.Reputation(standing="quarantined"),
            ),
            pb.Present(executor_id=silent, online=False, last_seen_us=1),
        ]
        while (await states())[0][0] == "unknown":
            await asyncio.sleep(0.05)
        assert await states() == [("online", 3), ("offline", 0), ("offline", 0)]
        got = await call(registry.executors.Get(pb.GetRequest(executor_id=pulls), metadata=registry.key))
        assert got.last_seen_us == 2**62 and scheduler.min_position == 0
        assert (got.reputation.standing, scheduler.agents_of) == ("quarantined", pulls)
        listed = (await call(registry.executors.List(pb.ListRequest(), metadata=registry.key))).executors
        assert [one.reputation.standing for one in listed] == ["quarantined", "new", "new"]
        drained = await call(registry.executors.Drain(pb.DrainRequest(executor_id=pulls), metadata=registry.key))
        assert drained.position == scheduler.min_position > 0
        undrain = pb.DrainRequest(executor_id=pulls, undrain=True)
        await call(registry.executors.Drain(undrain, metadata=registry.key))
        assert scheduler.min_position > drained.position
        # Before a version is said to be yanked, or a key to be distrusted, the scheduler acts by it.
        await registry.push(await registry.upload(package()))
        yank = agents_pb2.YankRequest(name="square", version="1.0.0", reason="it leaks")
        distrust = agents_pb2.DistrustRequest(key=public_hex(AUTHOR), reason="stolen")
        for told, asked, kind in (
            (registry.agents.Yank, yank, "AgentVersionYanked"),
            (registry.agents.Yank, yank, "AgentVersionYanked"),
            (registry.agents.Distrust, distrust, "SigningKeyDistrusted"),
        ):
            scheduler.min_position = 0
            await call(told(asked, metadata=registry.key))
            (decided,) = [one.position for one in await registry.events() if one.type == kind]
            assert scheduler.min_position >= decided
        await server.stop(0)
        assert await states() == [("unknown", 0)] * 3
        await registry.close()


async def test_views_can_be_rebuilt_from_the_log(
    config: ServiceConfig, database: Database, nats_server: NatsServer
) -> None:
    async with running_service(main, config) as channel:
        registry = Registry(config, channel, database, nats_server)
        for slots in range(1, 6):
            await registry.hello(await registry.joined(f"device-{slots}"), slots=slots)
        await call(registry.executors.Drain(pb.DrainRequest(executor_id="device-3"), metadata=registry.key))
        await call(registry.executors.Revoke(pb.RevokeRequest(executor_id="device-4"), metadata=registry.key))
        await call(registry.executors.IssueToken(pb.IssueTokenRequest(), metadata=registry.key))
        before = await call(registry.executors.List(pb.ListRequest(), metadata=registry.key))
        head = (await registry.events())[-1].position
        await registry.close()
    async with await psycopg.AsyncConnection.connect(database.dsn, autocommit=True) as conn:
        await conn.execute(
            "TRUNCATE registry.executors, registry.agent_versions, registry.join_tokens, registry.retired_keys"
        )
        await conn.execute("DELETE FROM registry.projections")
    async with running_service(main, config) as channel:
        registry = Registry(config, channel, database, nats_server)
        # A hello is answered from a view that has caught up.
        await registry.hello(await registry.joined("another"))
        after = await call(registry.executors.List(pb.ListRequest(), metadata=registry.key))
        assert [(e.executor_id, e.name, e.slots, e.position, e.registered_us) for e in before.executors] == [
            (e.executor_id, e.name, e.slots, e.position, e.registered_us)
            for e in after.executors
            if e.position <= head
        ]
        states = [e.state for e in after.executors]
        assert (states.count("drained"), states.count("revoked")) == (1, 1)
        await registry.close()
