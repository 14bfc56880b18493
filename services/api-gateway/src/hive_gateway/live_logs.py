"""Log lines of guests while they run, from NATS to whoever follows a job. Best effort, as the lines themselves."""

import asyncio
import contextlib
import logging
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, Iterator

import msgspec
import nats.errors
from hive_common.bus.allowance import Allowance
from hive_common.bus.intake import Intake
from hive_common.bus.nats import connect, settled
from hive_common.contracts.messages import LogBatch
from hive_common.kernel.errors import Unavailable
from hive_common.ops.config import NatsConfig
from nats.aio.client import Client
from nats.aio.msg import Msg

log = logging.getLogger(__name__)

SUBJECT = "hive.exec.*.log.*"
HOLDERS_MAX = 20_000
"""Attempts of one job whose lines are let through: the latest ones."""
EARLY_MAX = 100
"""Batches that wait for the event that says who may send them."""
BATCHES_WAITING_MAX = 1_000
"""Batches kept for a follower that reads slowly; what comes on top is dropped and counted."""

BATCHES = Allowance(per_s=4_000, burst=4_000, in_flight=0, flood_per_s=4_000)
"""Of each executor: an attempt sends twenty a second at most."""

_CONNECT_DELAY_S = 1.0


async def _flooded(executor: str, message: Msg) -> None:
    """Lines are best effort: nobody is told."""


class Follower:
    """What one follower of a job has not read yet.

    Any executor can say that lines are of this job, so only those of the one that an attempt was assigned to count.
    """

    def __init__(self) -> None:
        self._batches: asyncio.Queue[LogBatch] = asyncio.Queue(BATCHES_WAITING_MAX)
        self._dropped = 0
        self._holders: OrderedDict[tuple[str, int], str] = OrderedDict()
        self._early: deque[tuple[str, LogBatch]] = deque(maxlen=EARLY_MAX)

    def assigned(self, task: str, attempt: int, executor: str) -> None:
        """Learn who runs an attempt."""
        self._holders[task, attempt] = executor
        if len(self._holders) > HOLDERS_MAX:
            self._holders.popitem(last=False)
        early, self._early = self._early, deque(maxlen=EARLY_MAX)
        for sender, batch in early:
            self.offer(sender, batch)

    def offer(self, executor: str, batch: LogBatch) -> None:
        """Take a batch, or count it as dropped."""
        holder = self._holders.get((batch.task, batch.attempt))
        if holder is None:
            # Lines and events come on different ways.
            self._early.append((executor, batch))
            return
        if holder != executor:
            log.warning("executor %s sends lines of attempt %s-%d of another", executor, batch.task, batch.attempt)
            return
        try:
            self._batches.put_nowait(batch)
        except asyncio.QueueFull:
            self._dropped += 1

    async def take(self) -> LogBatch:
        """Return the next batch once there is one."""
        return await self._batches.get()

    def take_now(self) -> LogBatch | None:
        """Return the next batch if there is one."""
        return None if self._batches.empty() else self._batches.get_nowait()

    def take_dropped(self) -> int:
        """Return how many batches were dropped since the last time this was asked."""
        dropped, self._dropped = self._dropped, 0
        return dropped


class LiveLogs:
    """Subscribed to the logs of all executors while, and only while, somebody follows a job."""

    def __init__(self) -> None:
        self._client: Client | None = None
        self._subscription: Intake | None = None
        self._followers: dict[str, set[Follower]] = {}
        self._changing = asyncio.Lock()
        self._decoder = msgspec.json.Decoder(LogBatch)

    async def connect(self, config: NatsConfig) -> None:
        """Connect to NATS, however long that takes; the gateway works without it but for live logs."""
        while self._client is None:
            try:
                self._client = await connect(config, "gateway")
            except Unavailable as error:
                log.warning("%s", error.message)
                await asyncio.sleep(_CONNECT_DELAY_S)

    async def close(self) -> None:
        """Close the connection."""
        if self._client is not None:
            await self._client.close()

    @contextlib.asynccontextmanager
    async def follow(self, job_id: str) -> AsyncGenerator[Follower, None]:
        """Collect the batches of a job while the block runs.

        Raises:
            Unavailable: there is no connection to NATS now.
        """
        with self._registered(job_id) as follower:
            await self._adjust()
            try:
                yield follower
            finally:
                # A cancelled follower still has to leave: the last one ends the subscription.
                self._forget(job_id, follower)
                await asyncio.shield(self._adjust())

    @contextlib.contextmanager
    def _registered(self, job_id: str) -> Iterator[Follower]:
        if self._client is None or not self._client.is_connected:
            raise Unavailable("live logs need NATS, which cannot be reached now")
        follower = Follower()
        self._followers.setdefault(job_id, set()).add(follower)
        try:
            yield follower
        finally:
            self._forget(job_id, follower)

    def _forget(self, job_id: str, follower: Follower) -> None:
        followers = self._followers.get(job_id, set())
        followers.discard(follower)
        if not followers:
            self._followers.pop(job_id, None)

    async def _adjust(self) -> None:
        async with self._changing:
            try:
                if self._followers and self._subscription is None and self._client is not None:
                    intake = Intake(self._client, SUBJECT, self._receive, _flooded, BATCHES)
                    self._subscription = await intake.open()
                    await settled(self._client)
                elif not self._followers and self._subscription is not None:
                    subscription, self._subscription = self._subscription, None
                    await subscription.unsubscribe()
            except nats.errors.Error as error:
                raise Unavailable(f"live logs need NATS: {error}") from error

    async def _receive(self, executor: str, message: Msg) -> None:
        try:
            batch = self._decoder.decode(message.data)
        except msgspec.DecodeError as error:
            log.warning("%s: %s", message.subject, error)
            return
        for follower in self._followers.get(batch.job, ()):
            follower.offer(executor, batch)
