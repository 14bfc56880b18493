"""Kill orders at the registry: who may give the next one, what it says to whom, and what it refuses."""

import asyncio
from typing import Any

import msgspec
import pytest
from hive_common.bus.nats import connect
from hive_common.contracts.messages import KILL_SUBJECT, KillOrder
from hive_common.control import keys
from hive_common.control.kill_log import stream_of
from hive_common.control.verifier import FORGED, REFUSED
from hive_common.kernel.errors import Conflict, FailedPrecondition, InvalidArgument, NotFound, PermissionDenied
from hive_common.kernel.ids import new_id
from hive_common.ops.config import ServiceConfig
from hive_common.rpc.client import call
from hive_common.testing.identities import EVERYTHING
from hive_common.testing.kills import KillKey
from hive_proto.control.v1 import control_pb2, control_pb2_grpc
from hive_proto.executors.v1 import executors_pb2


@pytest.fixture
def kill_key() -> KillKey:
    return KillKey()


@pytest.fixture
def config(config: ServiceConfig, kill_key: KillKey) -> ServiceConfig:
    return msgspec.structs.replace(config, kill_public_key=kill_key.public)


class Orders:
    """The orders that go out on NATS."""

    def __init__(self) -> None:
        self.heard: list[KillOrder] = []
        self.came = asyncio.Event()

    async def receive(self, message: Any) -> None:
        self.heard.append(msgspec.json.decode(message.data, type=KillOrder))
        self.came.set()


@pytest.fixture
async def orders(registry):
    client = await connect(registry.nats_of(EVERYTHING), EVERYTHING)
    orders = Orders()
    await client.subscribe(KILL_SUBJECT, cb=orders.receive)
    await client.flush()
    yield orders
    await client.close()


async def give(registry, signed: KillOrder) -> control_pb2.Standing:
    stub = control_pb2_grpc.ControlStub(registry.channel)
    request = control_pb2.OrderRequest(order=signed.order, signature=signed.signature, caller="me")
    return await call(stub.Order(request, metadata=registry.key))


async def state(registry) -> control_pb2.Standing:
    stub = control_pb2_grpc.ControlStub(registry.channel)
    return await call(stub.State(control_pb2.StateRequest(), metadata=registry.key))


async def kill_events(registry) -> list[str]:
    return [stored.type for stored in await registry.events() if stored.type == "KillOrdered"]


async def test_an_order_is_written_down_and_told_to_everybody(registry, orders, kill_key) -> None:
    executor = await registry.joined("laptop")
    assert (await state(registry)).epoch == 0
    signed = kill_key.kill("executor", executor, "stolen")
    standing = await give(registry, signed)
    await orders.came.wait()
    assert orders.heard == [signed]
    assert await kill_events(registry) == ["KillOrdered"]
    (stop,) = standing.stops
    assert (standing.epoch, standing.order, stop.name, stop.reason) == (1, signed.order, "laptop", "stolen")
    assert (await registry.hello(executor)).kill == signed
    found = await call(
        registry.executors.Get(executors_pb2.GetRequest(executor_id=executor), metadata=registry.key)
    )
    assert found.state == "killed"
    standing = await give(registry, kill_key.lift("executor", executor))
    assert (standing.epoch, list(standing.stops)) == (2, [])


async def test_an_order_whose_answer_was_lost_may_be_sent_again(registry, orders, kill_key) -> None:
    signed = kill_key.kill("all")
    first = await give(registry, signed)
    assert await give(registry, signed) == first
    assert await kill_events(registry) == ["KillOrdered"]


async def test_of_two_orders_at_the_same_time_one_has_to_be_given_anew(registry, kill_key) -> None:
    one = kill_key.kill("all")
    kill_key.last = None
    other = kill_key.kill("job", new_id())
    given = await asyncio.gather(give(registry, one), give(registry, other), return_exceptions=True)
    assert sorted(isinstance(answer, Conflict) for answer in given) == [False, True]
    assert await kill_events(registry) == ["KillOrdered"]


async def test_forged_and_old_orders_are_refused_and_counted(registry, kill_key) -> None:
    before = REFUSED.labels(FORGED)._value.get()
    first, second = kill_key.kill("all"), kill_key.lift("all")
    await give(registry, first)
    await give(registry, second)
    with pytest.raises(PermissionDenied, match="not signed with this installation's kill key"):
        await give(registry, KillKey().kill("all"))
    with pytest.raises(Conflict, match="epoch 1 was used: the next order has 3"):
        await give(registry, first)
    assert REFUSED.labels(FORGED)._value.get() == before + 1
    assert (await state(registry)).epoch == 2


async def test_an_order_that_leaves_an_epoch_out_is_refused(registry, kill_key) -> None:
    kill_key.kill("all")
    with pytest.raises(Conflict, match="expected 1"):
        await give(registry, kill_key.kill("job", new_id()))


async def test_an_order_that_hides_what_stands_is_refused(registry, kill_key) -> None:
    await give(registry, kill_key.kill("all"))
    assert kill_key.last is not None
    hiding = msgspec.structs.replace(kill_key.last, epoch=2, scope="job", target=new_id(), standing=())
    with pytest.raises(InvalidArgument, match="standing"):
        await give(registry, keys.sign(keys.private_key(kill_key.pem, ""), hiding))


async def test_what_nobody_knows_is_said_in_a_sentence(registry, kill_key) -> None:
    with pytest.raises(NotFound, match="there is no agent square"):
        await give(registry, kill_key.kill("agent", "square"))
    kill_key.last = None
    with pytest.raises(NotFound, match="there is no executor"):
        await give(registry, kill_key.kill("executor", new_id()))
    assert await kill_events(registry) == []


async def test_no_version_of_a_stopped_agent_comes_in_until_the_order_is_lifted(
    registry, package, kill_key
) -> None:
    await registry.push(await registry.upload(package()))
    await give(registry, kill_key.kill("agent", "square", "hostile"))
    later = await registry.upload(package(version="1.1.0"))
    with pytest.raises(
        FailedPrecondition, match=r"stopped by kill order 1 \(hostile\).*hive unkill --agent square"
    ):
        await registry.push(later)
    await give(registry, kill_key.lift("agent", "square"))
    assert (await registry.push(later)).version == "1.1.0"


async def test_a_registry_that_starts_knows_what_the_log_has(registry, kill_key, config) -> None:
    """As after a crash between the event and the order on NATS."""
    executor = await registry.joined()
    signed = kill_key.kill("executor", executor)
    await registry.append(stream_of("default"), kill_key.event(signed))
    assert (await state(registry)).order == signed.order
    assert (await registry.hello(executor)).kill == signed


async def test_a_machine_gets_the_key_that_verifies_orders_with_its_credentials(registry, kill_key) -> None:
    executor = await registry.joined()
    request = executors_pb2.RenewRequest(executor_id=executor)
    credentials = await call(registry.executors.Renew(request, metadata=registry.key))
    assert credentials.kill_public_key == kill_key.public
