"""The connection to the control plane, and the moments at which whatever waits for an answer must ask again."""

import asyncio
import logging
import random
from collections.abc import Callable
from typing import Any, Final, TypeVar

import msgspec
import nats.errors
from hive_common.bus.nats import connect, request, settled
from hive_common.contracts.messages import LEADER_SUBJECT, LeaderAnnouncement, Message, inbox_prefix
from hive_common.kernel.errors import Unavailable
from hive_common.ops.config import NatsConfig
from nats.aio.client import Client
from nats.aio.msg import Msg

log = logging.getLogger(__name__)
R = TypeVar("R", bound=Message)


class Link:
    """One executor's connection to NATS.

    A request that is under way when the scheduler or the connection changes would wait for an answer that does
    not come. Such a moment is a *reset*: it ends requests early and calls `on_reset`.
    """

    def __init__(self, executor_id: str) -> None:
        self.executor_id = executor_id
        self.epoch = 0
        """The highest epoch of a leader that was seen."""
        self._client: Client | None = None
        self._is_closing = False
        self._reset: asyncio.Future[None] | None = None
        self._listeners: list[Callable[[], None]] = []

    @property
    def client(self) -> Client:
        """The connection; `open` has made it."""
        assert self._client is not None
        return self._client

    @property
    def is_connected(self) -> bool:
        """Say whether messages can be sent now."""
        return self._client is not None and self._client.is_connected

    def on_reset(self, listener: Callable[[], None]) -> None:
        """Call `listener` at each reset."""
        self._listeners.append(listener)

    async def open(self, config: NatsConfig) -> None:
        """Connect, however long that takes.

        Raises:
            InvalidArgument: the password file cannot be used.
            Unavailable: the server refuses for good.
        """
        self._client = await connect(
            config,
            f"executor {self.executor_id}",
            inbox=inbox_prefix(self.executor_id),
            on_disconnect=self._disconnected,
            on_reconnect=self._reconnected,
        )
        await self._client.subscribe(LEADER_SUBJECT, cb=self._leader_changed)
        await settled(self._client)

    async def close(self) -> None:
        """Disconnect."""
        self._is_closing = True
        if self._client is not None:
            await self._client.close()

    async def request(self, subject: str, body: Message, reply_type: type[R], timeout_s: float) -> R:
        """Ask and return the answer.

        Raises:
            Unavailable: nobody listens, there is no connection, or a reset came first.
            DeadlineExceeded: no answer in time.
            InvalidArgument: the answer does not fit.
        """
        if not self.is_connected:
            raise Unavailable("not connected to NATS")
        reset = self._reset_future()
        asking = asyncio.create_task(request(self.client, subject, body, reply_type, timeout_s))
        either: set[asyncio.Future[Any]] = {asking, reset}
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not asking.done():
                raise Unavailable("the scheduler or the connection changed while a request was under way")
            return asking.result()
        finally:
            asking.cancel()

    async def publish(self, subject: str, data: bytes, reply: str = "") -> None:
        """Send a message; while the connection is away, some of it waits.

        Raises:
            Unavailable: there is no connection, or no more room to wait for one.
        """
        if self._client is None:
            raise Unavailable("not connected to NATS")
        try:
            await self._client.publish(subject, data, reply)
        except (nats.errors.Error, OSError) as error:
            raise Unavailable(f"{subject}: {error or type(error).__name__}") from error

    def saw_epoch(self, epoch: int) -> bool:
        """Take note of the epoch of a leader; return whether it is not older than one seen before."""
        if epoch < self.epoch:
            return False
        self.epoch = epoch
        return True

    def _reset_future(self) -> "asyncio.Future[None]":
        if self._reset is None or self._reset.done():
            self._reset = asyncio.get_running_loop().create_future()
        return self._reset

    def _signal_reset(self) -> None:
        if self._reset is not None and not self._reset.done():
            self._reset.set_result(None)
        for listener in self._listeners:
            listener()

    async def _disconnected(self) -> None:
        if not self._is_closing:
            log.warning("the connection to NATS is lost")
            self._signal_reset()

    async def _reconnected(self) -> None:
        log.info("connected to NATS again")
        self._signal_reset()

    async def _leader_changed(self, message: Msg) -> None:
        try:
            announcement = msgspec.json.decode(message.data, type=LeaderAnnouncement)
        except msgspec.DecodeError as error:
            log.warning("%s: %s", message.subject, error)
            return
        log.info("a scheduler leads with epoch %d", announcement.epoch)
        if self.saw_epoch(announcement.epoch):
            self._signal_reset()


class Backoff:
    """Waits that double between `first_s` and `max_s`, with jitter, so that many clients do not come at once."""

    def __init__(self, first_s: float = 0.05, max_s: float = 1.0) -> None:
        self._first_s: Final = first_s
        self._max_s: Final = max_s
        self._next_s = first_s

    def next_s(self) -> float:
        """Return how long to wait now."""
        wait_s = self._next_s
        self._next_s = min(2 * wait_s, self._max_s)
        return wait_s * random.uniform(0.5, 1.0)  # noqa: S311

    def reset(self) -> None:
        """Start again with the shortest wait."""
        self._next_s = self._first_s
