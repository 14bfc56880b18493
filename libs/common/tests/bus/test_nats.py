"""What services and executors rely on at the bus, whichever server it is."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.bus import heads, intake
from hive_common.bus import nats as bus
from hive_common.bus.allowance import REQUESTS
from hive_common.contracts.messages import (
    HEAD_SUBJECT,
    HeadHint,
    HelloReply,
    HelloRequest,
    Message,
    hello_subject,
    inbox_prefix,
)
from hive_common.kernel.errors import DeadlineExceeded, InvalidArgument, NotFound, Unavailable, body_of
from hive_common.kernel.ids import new_id
from hive_common.ops.config import NatsConfig
from hive_common.testing.fixtures import NatsServer
from hive_common.testing.identities import EVERYTHING
from hive_common.testing.proxy import TcpProxy
from nats.aio.client import Client
from nats.aio.msg import Msg

Handler = Callable[[str, HelloRequest], Awaitable[Message]]
Connect = Callable[..., Awaitable[Client]]
PULLING = "hive.exec.*.hello"


class Greeting(HelloRequest, frozen=True, kw_only=True):
    """A request whose fields have defaults."""

    name: str = "one"
    session: str = "s"
    capabilities: Any = None


def refusal(error: BaseException) -> Message:
    return HelloReply(error=body_of(error))


@pytest.fixture
def nats_config(nats_server: NatsServer, tmp_path: Path) -> NatsConfig:
    return nats_server.issuer.service(EVERYTHING, tmp_path)


@pytest.fixture
async def connect(nats_config: NatsConfig) -> AsyncIterator[Connect]:
    clients: list[Client] = []

    async def make(name: str = "service", port: int = 0, **options: Any) -> Client:
        url = f"nats://127.0.0.1:{port}" if port else nats_config.url
        client = await bus.connect(msgspec.structs.replace(nats_config, url=url), name, **options)
        clients.append(client)
        return client

    yield make
    for client in clients:
        await client.close()


async def serve(client: Client, handler: Handler) -> None:
    await bus.respond(client, PULLING, Greeting, handler, refusal)
    await client.flush()


async def answer(executor: str, body: HelloRequest) -> HelloReply:
    return HelloReply(position=7, blobs_url=f"{executor} {body.name}")


async def test_an_executor_is_answered_under_its_own_inbox(connect: Connect) -> None:
    executor = new_id()
    await serve(await connect(), answer)
    client = await connect(executor, inbox=inbox_prefix(executor))
    reply = await bus.request(client, hello_subject(executor), Greeting(name="laptop"), HelloReply, 20)
    assert reply == HelloReply(position=7, blobs_url=f"{executor} laptop")


async def test_a_reply_subject_outside_of_the_callers_inbox_is_never_published_to(connect: Connect) -> None:
    executor, other = new_id(), new_id()
    handled: list[str] = []

    async def note(caller: str, body: HelloRequest) -> HelloReply:
        handled.append(body.name)
        return HelloReply()

    service, client = await connect(), await connect(executor, inbox=inbox_prefix(executor))
    await serve(service, note)
    heard: list[str] = []

    async def hear(message: Any) -> None:
        heard.append(message.subject)

    watcher = await connect("watcher")
    forged = [inbox_prefix(other) + ".1", "hive.control.kill", inbox_prefix(executor) + "x.1"]
    for subject in forged:
        await watcher.subscribe(subject, cb=hear)
    await watcher.flush()
    for subject in forged:
        await client.publish(hello_subject(executor), msgspec.json.encode(Greeting(name="forged")), reply=subject)
    # The honest request comes behind the forged ones on the same connections: once it is answered, they were read.
    await bus.request(client, hello_subject(executor), Greeting(name="honest"), HelloReply, 20)
    await watcher.flush()
    assert (handled, heard) == (["honest"], [])


async def test_a_failure_travels_as_its_body_and_that_of_a_foreign_exception_stays_inside(connect: Connect) -> None:
    executor = new_id()

    async def fail(caller: str, body: HelloRequest) -> HelloReply:
        raise NotFound("no such thing", path="x") if body.name == "known" else RuntimeError("a secret")

    await serve(await connect(), fail)
    client = await connect(executor, inbox=inbox_prefix(executor))
    replies = [
        await bus.request(client, hello_subject(executor), Greeting(name=name), HelloReply, 20)
        for name in ("known", "foreign")
    ]
    assert [reply.error and reply.error.code for reply in replies] == ["not_found", "internal"]
    assert replies[1].error is not None and "secret" not in replies[1].error.message


async def test_a_body_that_does_not_fit_is_refused_and_the_responder_goes_on(connect: Connect) -> None:
    executor = new_id()
    await serve(await connect(), answer)
    client = await connect(executor, inbox=inbox_prefix(executor))
    for raw in (b"", b"{", b'{"name": 1}', b"[" * 100_000):
        message = await client.request(hello_subject(executor), raw, timeout=20)
        error = msgspec.json.decode(message.data, type=HelloReply).error
        assert error is not None and error.code == "invalid_argument"
    assert (await bus.request(client, hello_subject(executor), Greeting(), HelloReply, 20)).position == 7


async def test_requests_are_handled_side_by_side(connect: Connect) -> None:
    executor, all_here, waiting = new_id(), asyncio.Event(), 0

    async def meet(caller: str, body: HelloRequest) -> HelloReply:
        nonlocal waiting
        waiting += 1
        if waiting == 20:
            all_here.set()
        await all_here.wait()
        return HelloReply(blobs_url=body.name)

    await serve(await connect(), meet)
    client = await connect(executor, inbox=inbox_prefix(executor))
    asked = [bus.request(client, hello_subject(executor), Greeting(name=str(n)), HelloReply, 20) for n in range(20)]
    assert [reply.blobs_url for reply in await asyncio.gather(*asked)] == [str(n) for n in range(20)]


async def test_nobody_there_is_unavailable_at_once_and_silence_is_a_deadline(connect: Connect) -> None:
    executor = new_id()
    client = await connect(executor, inbox=inbox_prefix(executor))
    with pytest.raises(Unavailable, match="hello"):
        await bus.request(client, hello_subject(executor), Greeting(), HelloReply, 3600)

    async def never(caller: str, body: HelloRequest) -> HelloReply:
        await asyncio.Event().wait()
        raise AssertionError

    await serve(await connect(), never)
    with pytest.raises(DeadlineExceeded, match="hello"):
        await bus.request(client, hello_subject(executor), Greeting(), HelloReply, 0.2)


async def test_a_connection_that_is_gone_cannot_settle(connect: Connect) -> None:
    client = await connect()
    await bus.settled(client)
    await client.close()
    with pytest.raises(Unavailable, match="NATS"):
        await bus.settled(client)


@pytest.mark.parametrize("refused", [True, False])
async def test_a_connect_that_is_cancelled_as_its_attempt_ends_does_not_go_on(
    nats_config: NatsConfig, monkeypatch: pytest.MonkeyPatch, refused: bool
) -> None:
    opened, ends = asyncio.Event(), asyncio.Event()
    open_connection = asyncio.open_connection

    async def attempt(*address: Any, **options: Any) -> Any:
        connection = await open_connection(*address, **options)
        opened.set()
        await ends.wait()
        if refused:
            connection[1].close()
            raise ConnectionRefusedError
        return connection

    monkeypatch.setattr(asyncio, "open_connection", attempt)
    connecting = asyncio.create_task(bus.connect(nats_config, EVERYTHING))
    await opened.wait()
    # The attempt has ended when the one that waits for it wakes up cancelled.
    ends.set()
    connecting.cancel()
    await asyncio.wait({connecting}, timeout=20)
    assert connecting.cancelled()


async def test_a_flush_goes_out_behind_what_was_said_before_it(connect: Connect, nats_server: NatsServer) -> None:
    told = bytearray()

    def note(chunk: bytes) -> bytes:
        told.extend(chunk)
        return chunk

    async with TcpProxy(nats_server.port) as proxy:
        client = await connect(port=proxy.port)
        proxy.change = note
        subscription = await client.subscribe("here")
        await client.flush()
        assert told.index(b"SUB here") < told.index(b"PING")
        told.clear()
        # Else what the server brings between its PONG and the UNSUB is lost.
        await subscription.drain()
        assert told.index(b"UNSUB") < told.index(b"PING")
        await client.close()


async def test_a_client_whose_flush_was_cancelled_goes_on_hearing(connect: Connect) -> None:
    executor = new_id()
    await serve(await connect(), answer)
    client = await connect(executor, inbox=inbox_prefix(executor))
    flush = asyncio.create_task(client.flush())
    await asyncio.sleep(0)
    flush.cancel()
    with pytest.raises(asyncio.CancelledError):
        await flush
    await client.flush()
    reply = await bus.request(client, hello_subject(executor), Greeting(), HelloReply, 20)
    assert (reply.position, client.stats["reconnects"]) == (7, 0)


async def test_an_answer_that_does_not_fit_is_said_to(connect: Connect) -> None:
    executor, service = new_id(), await connect()

    async def babble(message: Any) -> None:
        await message.respond(b"babble")

    await service.subscribe(hello_subject(executor), cb=babble)
    await service.flush()
    client = await connect(executor, inbox=inbox_prefix(executor))
    with pytest.raises(InvalidArgument, match="hello"):
        await bus.request(client, hello_subject(executor), Greeting(), HelloReply, 20)


async def test_a_cut_connection_comes_back_with_its_subscriptions(
    connect: Connect, nats_server: NatsServer
) -> None:
    executor, lost, back = new_id(), asyncio.Event(), asyncio.Event()

    async def on_disconnect() -> None:
        lost.set()

    async def on_reconnect() -> None:
        back.set()

    async with TcpProxy(nats_server.port) as proxy:
        service = await connect(port=proxy.port, on_disconnect=on_disconnect, on_reconnect=on_reconnect)
        await serve(service, answer)
        client = await connect(executor, inbox=inbox_prefix(executor))
        for _ in range(2):
            lost.clear()
            back.clear()
            proxy.cut_all()
            async with asyncio.timeout(30):
                await lost.wait()
                await back.wait()
            await service.flush()
            assert (await bus.request(client, hello_subject(executor), Greeting(), HelloReply, 20)).position == 7
        await service.close()


async def test_a_server_that_is_not_there_yet_is_waited_for(connect: Connect, nats_server: NatsServer) -> None:
    async with TcpProxy(nats_server.port) as proxy:
        proxy.refuse()
        connecting = asyncio.create_task(connect(port=proxy.port))
        async with asyncio.timeout(30):
            while proxy.connections < 2:
                await asyncio.sleep(0.01)
        assert not connecting.done()
        proxy.refuse(False)
        async with asyncio.timeout(30):
            client = await connecting
        await client.flush()
        await client.close()


async def test_the_server_is_of_the_release_that_is_shipped(connect: Connect) -> None:
    client = await connect()
    assert client.connected_server_version.major == 2
    assert client.connected_server_version.minor == 15


async def test_hints_wake_who_wants_their_types(connect: Connect) -> None:
    readers = {"Executor": asyncio.Event(), "all": asyncio.Event()}
    service = await connect()
    await heads.wake_on_head(service, readers["Executor"], types=("ExecutorRegistered",))
    await heads.wake_on_head(service, readers["all"])
    await service.flush()
    own = asyncio.Event()
    writer = await connect("writer")
    announce = heads.head_announcer(writer, own)
    for types, woken in (
        (("TaskCreated",), {"all"}),
        (("TaskCreated", "ExecutorRegistered"), {"all", "Executor"}),
        (("OfANewerVersion",), {"all", "Executor"}),
    ):
        for event in (own, *readers.values()):
            event.clear()
        await announce(9, types)
        await writer.flush()
        await service.flush()
        assert own.is_set()
        assert {name for name, event in readers.items() if event.is_set()} == woken


async def test_a_hint_says_where_the_log_is(connect: Connect) -> None:
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    service = await connect()

    async def hear(message: Any) -> None:
        heard.put_nowait(message.data)

    await service.subscribe(HEAD_SUBJECT, cb=hear)
    await service.flush()
    writer = await connect("writer")
    await heads.head_announcer(writer)(42, ("TaskCreated",))
    assert msgspec.json.decode(await heard.get(), type=HeadHint).position == 42


async def test_one_that_floods_is_told_a_few_times_and_the_others_are_answered(connect: Connect) -> None:
    flooder, other = new_id(), new_id()
    held = asyncio.Event()
    running = 0
    most = 0

    async def slow(executor: str, body: HelloRequest) -> HelloReply:
        nonlocal running, most
        if executor == flooder:
            running += 1
            most = max(most, running)
            await held.wait()
        return HelloReply(position=7)

    await serve(await connect(), slow)
    flooding = await connect(flooder, inbox=inbox_prefix(flooder))
    refused: list[HelloReply] = []

    async def receive(message: Msg) -> None:
        refused.append(msgspec.json.decode(message.data, type=HelloReply))

    await flooding.subscribe(f"{inbox_prefix(flooder)}.>", cb=receive)
    for _ in range(REQUESTS.in_flight + REQUESTS.flood_per_s // 2):
        await flooding.publish(
            hello_subject(flooder), msgspec.json.encode(Greeting()), reply=f"{inbox_prefix(flooder)}.x"
        )
    await flooding.flush()
    client = await connect(other, inbox=inbox_prefix(other))
    # Asked after all of the flood, so that it is through when this is answered.
    assert (await bus.request(client, hello_subject(other), Greeting(), HelloReply, 60)).position == 7
    assert most == REQUESTS.in_flight
    held.set()
    await flooding.flush()
    codes = {reply.error.code for reply in refused if reply.error is not None}
    assert codes == {"rate_limited"}


async def test_one_that_goes_on_flooding_is_fenced_off_for_a_while(
    connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(intake, "FENCE_S", 0.5)
    monkeypatch.setattr(intake, "LOOK_S", 0.05)
    flooder, seen, known = new_id(), new_id(), new_id()
    heard = dict.fromkeys((flooder, seen, known), 0)

    async def counted(executor: str, body: HelloRequest) -> HelloReply:
        heard[executor] += 1
        return await answer(executor, body)

    await bus.respond(await connect(), PULLING, Greeting, counted, refusal, lambda: [known])
    clients = {one: await connect(one, inbox=inbox_prefix(one)) for one in (flooder, seen, known)}

    async def asked(executor: str, timeout_s: float = 60) -> int:
        subject = hello_subject(executor)
        return (await bus.request(clients[executor], subject, Greeting(), HelloReply, timeout_s)).position

    async def is_heard() -> bool | None:
        try:
            return await asked(flooder, 1) == 7
        except Unavailable:
            return False
        except DeadlineExceeded:
            # What the server had brought already gets no answer at all.
            return None

    assert await asked(seen) == 7
    asking, times = True, 1

    async def go_on_asking() -> None:
        nonlocal times
        while asking:
            assert await asked(seen) == 7
            times += 1
            # Within what each may ask.
            await asyncio.sleep(0.001)

    whole_time = asyncio.create_task(go_on_asking())
    body = msgspec.json.encode(Greeting())
    # A fence that ended before this machine came to look is twice as long the next time.
    async with asyncio.timeout(60):
        while await is_heard() is not False:
            for _ in range(REQUESTS.burst + 2 * REQUESTS.flood_per_s):
                await clients[flooder].publish(hello_subject(flooder), body, reply=f"{inbox_prefix(flooder)}.x")
    # The server says that nobody listens, and the others are heard, also one that never asked before.
    assert await asked(known) == 7
    async with asyncio.timeout(60):
        while not await is_heard():
            await asyncio.sleep(0.05)
    assert [await asked(known), await asked(flooder)] == [7, 7]
    # There was no moment at which one of the others was not heard, and none at which it was heard twice.
    asking = False
    await whole_time
    assert heard[seen] == times
    assert heard[known] == 2


async def test_what_two_subscriptions_of_one_queue_group_would_get_comes_once(connect: Connect) -> None:
    service, executor = await connect(), new_id()
    heard: list[bytes] = []

    async def hear(message: Msg) -> None:
        heard.append(message.data)

    for subject in (PULLING, hello_subject(executor)):
        await service.subscribe(subject, queue="one", cb=hear)
    await service.flush()
    client = await connect(executor)
    sent = [b"%d" % number for number in range(200)]
    for data in sent:
        await client.publish(hello_subject(executor), data)
    await client.flush()
    async with asyncio.timeout(60):
        while len(heard) < len(sent):
            await asyncio.sleep(0.01)
    await service.flush()
    assert sorted(heard) == sorted(sent)
