"""Hears what all executors say on one subject, but not one that floods.

What is beyond an executor's allowance is dropped unread. That still costs a service as much time as NATS can bring
messages, and whoever comes after them waits. So one that goes on is fenced off: the subscription to the subject of
all is replaced by one for each of the others, and the server brings nothing of it any more.

What replaces a subscription is there for a while before that one ends, so that nobody is told that nobody listens.
All of them are one queue group, to which the server brings each message once.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Final, Self

import nats.errors
from nats.aio.client import Client
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from hive_common.bus.allowance import Allowance, Allowances, Verdict
from hive_common.kernel.ids import new_id
from hive_common.ops.telemetry import FENCED, REQUESTS

log = logging.getLogger(__name__)

FENCE_S: Final = 30.0
FENCE_S_MAX: Final = 600.0
"""How long one is not heard: doubled each time."""
LOOK_S: Final = 1.0
"""How soon an executor that is new while another one is fenced off is heard."""
OVERLAP_S: Final = 0.1
"""How long both are there: the server may have looked up who listens, and bring the message only then."""
_EXECUTOR_AT: Final = 2

Take = Callable[[str, Msg], Awaitable[None]]


class Intake:
    """One subject of all executors.

    Args:
        client: the service's connection.
        subject: such as `hive.exec.*.pull`; its third token is the executor's id.
        take: gets the executor's id and the message, one after another.
        refuse: gets those that are to be told that they are too many: one a second.
        allowance: of each executor.
        known: executors to hear while one of them is fenced off, besides those that were heard.
    """

    def __init__(
        self,
        client: Client,
        subject: str,
        take: Take,
        refuse: Take,
        allowance: Allowance,
        known: Callable[[], Iterable[str]] = lambda: (),
    ) -> None:
        self._client = client
        self._subject = subject
        self._method = next(part for part in reversed(subject.split(".")) if part != "*")
        self._take = take
        self._refuse = refuse
        self._known = known
        self._queue = new_id()
        self._now_s = asyncio.get_running_loop().time
        self._allowances = Allowances(allowance, self._now_s)
        self._all: Subscription | None = None
        self._each: dict[str, Subscription] = {}
        self._fenced: dict[str, float] = {}
        self._fence_s: dict[str, float] = {}
        self._fencing: asyncio.Task[None] | None = None
        self._ending: set[asyncio.Task[None]] = set()

    async def open(self) -> Self:
        """Begin to hear."""
        self._all = await self._subscribed(self._subject)
        return self

    async def unsubscribe(self) -> None:
        """Hear nothing more; what has come and was not handled yet is let go."""
        if self._fencing is not None:
            self._fencing.cancel()
            await asyncio.wait({self._fencing})
        subscriptions = [*self._each.values(), *filter(None, [self._all])]
        self._each, self._all = {}, None
        for subscription in subscriptions:
            await subscription.unsubscribe()

    def done(self, executor: str) -> None:
        """Say that what was taken is handled, where the allowance counts that."""
        self._allowances.done(executor)

    async def _receive(self, message: Msg) -> None:
        executor = message.subject.split(".", _EXECUTOR_AT + 1)[_EXECUTOR_AT]
        if executor in self._fenced:
            return
        verdict = self._allowances.ask(executor, len(message.data))
        if verdict is Verdict.TAKE:
            await self._take(executor, message)
            return
        REQUESTS.labels(self._method, "flood").inc()
        if verdict is Verdict.REFUSE:
            log.warning("%s: more than an executor may send, dropped", message.subject)
            await self._refuse(executor, message)
        elif self._allowances.floods(executor):
            self._fence(executor)

    def _fence(self, executor: str) -> None:
        seconds = min(self._fence_s.get(executor, FENCE_S / 2) * 2, FENCE_S_MAX)
        self._fence_s[executor] = seconds
        self._fenced[executor] = self._now_s() + seconds
        FENCED.inc()
        log.error("executor %s floods %s: it is not heard for %.0f s", executor, self._subject, seconds)
        if self._fencing is None or self._fencing.done():
            self._fencing = asyncio.create_task(self._keep_fence())

    async def _keep_fence(self) -> None:
        try:
            while self._fenced:
                await self._hear_the_others()
                await asyncio.sleep(LOOK_S)
                now_s = self._now_s()
                self._fenced = {executor: until for executor, until in self._fenced.items() if until > now_s}
                if not self._fenced:
                    await self._hear_all()
        except nats.errors.Error as error:
            # Of a connection that is closed for good.
            log.warning("%s: %s", self._subject, error)

    async def _hear_the_others(self) -> None:
        for executor in {*self._known(), *self._allowances.seen} - self._fenced.keys() - self._each.keys():
            self._each[executor] = await self._subscribed(self._subject.replace("*", executor, 1))
        if self._all is not None:
            await asyncio.sleep(OVERLAP_S)
            # What it has brought already is still handled.
            wide, self._all = self._all, None
            await self._let_go([wide])
        await self._let_go([self._each.pop(one) for one in self._fenced.keys() & self._each.keys()])

    async def _hear_all(self) -> None:
        await self.open()
        await asyncio.sleep(OVERLAP_S)
        each, self._each = self._each, {}
        await self._let_go(each.values())

    async def _subscribed(self, subject: str) -> Subscription:
        return await self._client.subscribe(subject, queue=self._queue, cb=self._receive)

    async def _let_go(self, subscriptions: Iterable[Subscription]) -> None:
        for subscription in subscriptions:
            ending = asyncio.create_task(subscription.drain())  # type: ignore[no-untyped-call]
            self._ending.add(ending)
            ending.add_done_callback(self._ended)
        # Its first step tells the server.
        await asyncio.sleep(0)

    def _ended(self, ending: "asyncio.Task[None]") -> None:
        self._ending.discard(ending)
        if not ending.cancelled() and (error := ending.exception()) is not None:
            log.warning("%s: %s", self._subject, error)
