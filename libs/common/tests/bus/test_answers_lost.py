"""Every call of the bus whose answer is lost: with the connection of who asked, or of who answered."""

import asyncio
import contextlib
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.bus import heads
from hive_common.bus import nats as bus
from hive_common.contracts.messages import HelloReply, HelloRequest, hello_subject, inbox_prefix
from hive_common.kernel.errors import DeadlineExceeded, Unavailable
from hive_common.kernel.ids import new_id
from hive_common.ops.config import NatsConfig
from hive_common.testing.fixtures import NatsServer
from hive_common.testing.identities import EVERYTHING
from hive_common.testing.proxy import TcpProxy
from hive_common.testing.wire import nats_answered
from nats.aio.client import Client

ASKED_MAX = 20
DEADLINE_S = 2.0
WITHIN_S = 60.0


class Greeting(HelloRequest, frozen=True, kw_only=True):
    """A request whose fields have defaults."""

    name: str = "one"
    session: str = "s"
    capabilities: Any = None


class World:
    """A responder, somebody who asks, and a wire that either may go over."""

    def __init__(self, config: NatsConfig, proxy: TcpProxy) -> None:
        self.proxy = proxy
        self.config = config
        self.executor = new_id()
        self.handled = 0
        self.before_answer: Callable[[], None] = lambda: None
        self._clients: list[Client] = []

    async def connect(self, name: str, *, through_wire: bool = False, **options: Any) -> Client:
        url = f"nats://127.0.0.1:{self.proxy.port}" if through_wire else self.config.url
        client = await bus.connect(msgspec.structs.replace(self.config, url=url), name, **options)
        self._clients.append(client)
        return client

    async def serve(self, **options: Any) -> Client:
        async def handle(executor: str, body: HelloRequest) -> HelloReply:
            self.handled += 1
            self.before_answer()
            return HelloReply(position=self.handled)

        client = await self.connect("service", **options)
        await bus.respond(client, "hive.exec.*.hello", Greeting, handle, lambda error: HelloReply())
        await client.flush()
        return client

    async def asker(self, **options: Any) -> Client:
        return await self.connect(self.executor, inbox=inbox_prefix(self.executor), **options)

    async def ask(self, client: Client, timeout_s: float = WITHIN_S) -> HelloReply:
        return await bus.request(client, hello_subject(self.executor), Greeting(), HelloReply, timeout_s)

    async def ask_until_lost(self, client: Client, lost: asyncio.Event) -> None:
        """Ask while an answer is to be lost; on a busy machine the time may be over before the answer comes."""
        for _ in range(ASKED_MAX):
            with pytest.raises((DeadlineExceeded, Unavailable)):
                await self.ask(client, DEADLINE_S)
            if lost.is_set():
                return
        raise AssertionError("no answer was lost")

    async def ask_again(self, client: Client) -> HelloReply:
        for _ in range(ASKED_MAX):
            with contextlib.suppress(DeadlineExceeded, Unavailable):
                return await self.ask(client, DEADLINE_S)
            await asyncio.sleep(0.05)
        raise AssertionError("nobody answers any more")

    async def close(self) -> None:
        for client in self._clients:
            await client.close()


@pytest.fixture
async def world(nats_server: NatsServer, tmp_path: Path) -> AsyncIterator[World]:
    async with TcpProxy(nats_server.port) as proxy:
        made = World(nats_server.issuer.service(EVERYTHING, tmp_path), proxy)
        yield made
        await made.close()


async def request(world: World) -> None:
    """The answer is lost with the asker's connection: its time runs out, and it may ask again."""
    await world.serve()
    client = await world.asker(through_wire=True)
    assert (await world.ask(client)).position == 1
    await world.ask_until_lost(client, world.proxy.cut_next_answer(nats_answered))
    assert world.handled >= 2  # it was done: who asks again must be able to bear that
    assert (await world.ask_again(client)).position == world.handled


async def respond(world: World) -> None:
    """The answer is lost with the responder's connection: it comes back with its subscription, and goes on."""
    await world.serve(through_wire=True)
    client = await world.asker()
    assert (await world.ask(client)).position == 1
    lost: list[asyncio.Event] = []

    def cut_once() -> None:
        if not lost:
            lost.append(world.proxy.cut_next_request())

    world.before_answer = cut_once
    with pytest.raises(DeadlineExceeded):
        await world.ask(client, DEADLINE_S)
    async with asyncio.timeout(WITHIN_S):
        while not lost:
            await asyncio.sleep(0.01)
        await lost[0].wait()
    assert (await world.ask_again(client)).position == world.handled >= 2


async def connect(world: World) -> None:
    """Whichever answer of the greeting is lost, the connection is made in the end, and works."""
    await world.serve()
    lost = 0
    while True:
        assert lost < ASKED_MAX
        cut = world.proxy.cut_next_answer(skip=lost)
        async with asyncio.timeout(WITHIN_S):
            client = await world.asker(through_wire=True)
        world.proxy.spare_answers()
        assert (await world.ask_again(client)).position == world.handled
        if not cut.is_set():
            break
        lost += 1
    assert lost > 0


async def wake_on_head(world: World) -> None:
    """A reader whose connection breaks when a hint comes misses that one and hears the next."""
    woken, lost = asyncio.Event(), world.proxy
    reader = await world.connect("reader", through_wire=True)
    await heads.wake_on_head(reader, woken)
    await reader.flush()
    announce = heads.head_announcer(await world.connect("writer"))
    lost.cut_all()
    async with asyncio.timeout(WITHIN_S):
        while not woken.is_set():
            await announce(7, ("TaskCreated",))
            await asyncio.sleep(0.05)


async def head_announcer(world: World) -> None:
    """A hint asks for no answer: it fails nobody where the connection is gone, and the next one arrives."""
    woken = asyncio.Event()
    reader = await world.connect("reader")
    await heads.wake_on_head(reader, woken)
    await reader.flush()
    announce = heads.head_announcer(await world.connect("writer", through_wire=True))
    cut = world.proxy.cut_next_request()
    async with asyncio.timeout(WITHIN_S):
        while not (cut.is_set() and woken.is_set()):
            if not cut.is_set():
                woken.clear()
            await announce(7, ("TaskCreated",))
            await asyncio.sleep(0.05)


async def settled(world: World) -> None:
    """It says that its answer is lost. Asked again it returns, and what was said holds."""
    reader, writer = await world.connect("reader", through_wire=True), await world.connect("writer")
    await bus.settled(reader)
    cut = world.proxy.cut_next_answer(b"PONG")
    subscription = await reader.subscribe(subject := f"hive.test.{new_id()}")
    with pytest.raises(Unavailable):
        await bus.settled(reader)
    assert cut.is_set()
    async with asyncio.timeout(WITHIN_S):
        await bus.settled(reader)
    await writer.publish(subject, b"heard")
    assert (await subscription.next_msg(WITHIN_S)).data == b"heard"


CASES: dict[str, Callable[[World], Awaitable[None]]] = {
    "connect": connect,
    "request": request,
    "respond": respond,
    "settled": settled,
    "wake_on_head": wake_on_head,
    "head_announcer": head_announcer,
}


def test_every_call_of_the_bus_has_a_case() -> None:
    calls = {
        name
        for module in (bus, heads)
        for name, found in vars(module).items()
        if inspect.isfunction(found) and found.__module__ == module.__name__ and not name.startswith("_")
    }
    assert CASES.keys() == calls - {"concerns"}  # which asks nobody


@pytest.mark.parametrize("name", CASES)
async def test_an_answer_is_lost(world: World, name: str) -> None:
    await CASES[name](world)
