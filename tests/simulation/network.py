"""A made-up NATS: what is said may be lost, come twice, come late and out of order, or not come through at all."""

import asyncio
import random
from collections.abc import Callable
from typing import Any, NamedTuple

from .loop import Process, VirtualLoop

NO_RESPONDERS = {"Status": "503"}


class Weather(NamedTuple):
    """How bad a network is.

    Attributes:
        drop, duplicate, delay: the share of messages that are lost, come twice, come late.
        delay_s: how late at most.
    """

    drop: float
    duplicate: float
    delay: float
    delay_s: float


CALM = Weather(0.0, 0.0, 0.0, 0.0)
WEATHERS = (CALM, Weather(0.01, 0.01, 0.05, 1.0), Weather(0.05, 0.05, 0.2, 3.0), Weather(0.2, 0.1, 0.3, 8.0))


class Message:
    """What a callback gets (nats.aio.msg.Msg)."""

    __slots__ = ("_client", "data", "headers", "reply", "subject")

    def __init__(self, client: "Client", subject: str, data: bytes, reply: str, headers: Any = None) -> None:
        self._client = client
        self.subject = subject
        self.data = data
        self.reply = reply
        self.headers = headers

    async def respond(self, data: bytes) -> None:
        """Answer it."""
        await self._client.publish(self.reply, data)


class Subscription:
    """A subscription of one client."""

    def __init__(self, client: "Client", subject: str, callback: Callable[[Message], Any]) -> None:
        self.client = client
        self.tokens = subject.split(".")
        self.callback = callback

    def matches(self, tokens: list[str]) -> bool:
        """Whether a subject is one of ours; `*` stands for one token."""
        mine = self.tokens
        return len(mine) == len(tokens) and all(a == "*" or a == b for a, b in zip(mine, tokens, strict=True))

    async def unsubscribe(self) -> None:
        """Hear nothing more."""
        self.client.bus.forget(self)

    async def drain(self) -> None:
        """Hear nothing more."""
        self.client.bus.forget(self)


class Client:
    """One connection (nats.aio.client.Client), of one process.

    Attributes:
        is_connected: what the client believes of the server.
        cut: whether nothing goes through.
    """

    def __init__(self, bus: "Bus", process: Process) -> None:
        self.bus = bus
        self.process = process
        self.is_closed = False
        self.is_connected = True
        self.cut = False
        self.on_disconnect: Callable[[], None] = lambda: None
        self.on_reconnect: Callable[[], None] = lambda: None

    async def subscribe(self, subject: str, queue: str = "", cb: Any = None) -> Subscription:
        """Hear a subject."""
        subscription = Subscription(self, subject, cb)
        self.bus.subscriptions.append(subscription)
        return subscription

    async def publish(self, subject: str, payload: bytes = b"", reply: str = "") -> None:
        """Say something."""
        self.bus.send(self, subject, payload, reply)

    async def close(self) -> None:
        """End."""
        self.is_closed = True
        self.bus.drop(self)


class Bus:
    """The server, and the wires to it.

    Attributes:
        weather: how bad they are now.
        watch: is told of everything that arrives; for the trace.
    """

    def __init__(self, loop: VirtualLoop, rng: random.Random) -> None:
        self._loop = loop
        self._rng = rng
        self.weather = CALM
        self.subscriptions: list[Subscription] = []
        self.clients: list[Client] = []
        self.sent = 0
        self.watch: Callable[[str, str, Message], None] = lambda *_: None

    def client(self, process: Process) -> Client:
        """Connect a process."""
        client = Client(self, process)
        self.clients.append(client)
        return client

    def drop(self, client: Client) -> None:
        """Forget a connection that is closed, or whose process is dead."""
        self.subscriptions = [one for one in self.subscriptions if one.client is not client]
        if client in self.clients:
            self.clients.remove(client)

    def forget(self, subscription: Subscription) -> None:
        """Forget a subscription."""
        if subscription in self.subscriptions:
            self.subscriptions.remove(subscription)

    def cut(self, client: Client, noticed_after_s: float) -> None:
        """Let nothing through from and to a client, which notices after a while."""
        client.cut = True
        self._loop.call_later(noticed_after_s, self._notice, client, context=client.process.context)

    def heal(self, client: Client) -> None:
        """Let it speak again."""
        client.cut = False
        self._loop.call_later(self._rng.uniform(0.01, 0.3), self._notice, client, context=client.process.context)

    def _notice(self, client: Client) -> None:
        if client.cut == client.is_connected:
            client.is_connected = not client.cut
            (client.on_disconnect if client.cut else client.on_reconnect)()

    def send(self, sender: Client, subject: str, data: bytes, reply: str) -> None:
        """Carry a message, or not."""
        self.sent += 1
        rng, weather = self._rng, self.weather
        if not sender.process.alive or sender.cut or rng.random() < weather.drop:
            return
        tokens = subject.split(".")
        receivers = [one for one in self.subscriptions if one.matches(tokens)]
        if not receivers and reply:
            self.send_no_responders(sender, reply)
        for receiver in receivers:
            copies = 2 if rng.random() < weather.duplicate else 1
            for _ in range(copies):
                message = Message(receiver.client, subject, data, reply)
                self._later(receiver, message, f"{sender.process} → {receiver.client.process}")

    def send_no_responders(self, sender: Client, reply: str) -> None:
        """Say that nobody listens, as the server does."""
        tokens = reply.split(".")
        for receiver in self.subscriptions:
            if receiver.client is sender and receiver.matches(tokens):
                self._later(receiver, Message(sender, reply, b"", "", NO_RESPONDERS), f"→ {sender.process}")

    def _later(self, receiver: Subscription, message: Message, way: str) -> None:
        rng, weather = self._rng, self.weather
        delay_s = rng.uniform(0.0002, 0.002)
        if rng.random() < weather.delay:
            delay_s += rng.random() ** 2 * weather.delay_s
        self._loop.call_later(
            delay_s, self._deliver, receiver, message, way, context=receiver.client.process.context
        )

    def _deliver(self, receiver: Subscription, message: Message, way: str) -> None:
        if receiver.client.cut or receiver not in self.subscriptions:
            return
        self.watch(way, message.subject, message)
        answer = receiver.callback(message)
        if asyncio.iscoroutine(answer):
            self._loop.create_task(answer)
