"""The pull loop: heartbeat, long poll for work, and the lease that comes back with it."""

import asyncio
import contextlib
import logging
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import Final, NamedTuple

import msgspec
import nats.errors
import nats.js.api
from hive_common.contracts.limits import PULL_ANSWER_MS
from hive_common.contracts.messages import Message, PullReply, PullRequest, inbox_prefix, pull_subject
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import PermissionDenied
from nats.aio.msg import Msg

from hive_executor.attempts import Attempts
from hive_executor.kill import KillSwitch
from hive_executor.link import Backoff, Link
from hive_executor.metrics import PULL_DURATION, PULLS
from hive_executor.signers import Signers
from hive_executor.spool import Spool

log = logging.getLogger(__name__)

PULL_TIMEOUT_S: Final = (PULL_ANSWER_MS + 500) / 1000
"""A pull that is not answered by then is lost. Two fit into a lease."""

_SENT_MAX: Final = 256
_NO_RESPONDERS: Final = "503"
_VERSION: Final = Message().v
_decode = msgspec.json.Decoder(PullReply).decode


class _Sent(NamedTuple):
    boot_ms: int
    at_s: float


class _Offer(NamedTuple):
    """What a pull says of slots (messages.PullRequest)."""

    slots_free: int
    ahead: int

    @property
    def has_slot(self) -> bool:
        """Say whether an attempt would start at once."""
        return self.slots_free > self.ahead


class Lease:
    """Until when the control plane counts on this executor, on a clock that runs through suspend."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._until_ms: int | None = None
        self._renewed_ms = clock.boot_ms()
        self._news = asyncio.Event()

    def renew(self, sent_ms: int, lease_ms: int) -> None:
        """Take a renewal; it counts from `sent_ms`, when the pull was sent."""
        was_valid = self.is_valid
        self._until_ms = max(self._until_ms or 0, sent_ms + lease_ms)
        self._renewed_ms = max(self._renewed_ms, sent_ms)
        if not was_valid:
            self._news.set()

    @property
    def is_valid(self) -> bool:
        """Say whether the lease has not run out."""
        return self._until_ms is not None and self._clock.boot_ms() < self._until_ms

    async def ends_or_returns(self, within_s: float) -> None:
        """Return when the lease runs out, when one that had is renewed, and after `within_s` at the latest."""
        if self._until_ms is not None and self.is_valid:
            within_s = min(within_s, (self._until_ms - self._clock.boot_ms()) / 1000)
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._news.wait()

    @property
    def age_ms(self) -> int:
        """Milliseconds since the last renewal, or since the start."""
        return self._clock.boot_ms() - self._renewed_ms


class Pulls:
    """Keeps exactly one pull outstanding.

    Answers come to an inbox of this session and are taken whenever they arrive, also those to a pull that a later
    one has replaced: their assignments are committed, and dropping them would only cost a round trip.

    Args:
        is_paused: whether the device wants no work now (battery).
        kill: obeys what an answer says of kill orders, before anything else in it.
        signers: know whose agents may run; an answer says how new that has to be.
        on_superseded: called when another session of this executor has taken over.
        on_refused: called when the scheduler says that this executor may not pull.
        greet: makes the executor known to the control plane; awaited when the scheduler does not know it.
    """

    def __init__(
        self,
        link: Link,
        *,
        session: str,
        attempts: Attempts,
        spool: Spool,
        lease: Lease,
        clock: Clock,
        kill: KillSwitch,
        signers: Signers,
        is_paused: Callable[[], bool],
        greet: Callable[[], object],
        on_superseded: Callable[[], None],
        on_refused: Callable[[], None] = lambda: None,
    ) -> None:
        self._link = link
        self._session = session
        self._attempts = attempts
        self._spool = spool
        self._lease = lease
        self._clock = clock
        self._kill = kill
        self._signers = signers
        self._is_paused = is_paused
        self._greet = greet
        self._on_superseded = on_superseded
        self._on_refused = on_refused
        self._sequence = 0
        self._sent: OrderedDict[int, _Sent] = OrderedDict()
        self._answered = 0
        self._failure = ""
        self._was_reset = False
        self._poke = asyncio.Event()
        self._backoff = Backoff()
        self.is_drained = False
        """Whether the control plane wants this executor to take nothing more."""
        self.is_stopping = False
        """Whether the process is about to end."""
        link.on_reset(self._on_reset)

    def poke(self) -> None:
        """Say that slots or the spool have changed."""
        self._poke.set()

    def stop_taking(self) -> None:
        """Take nothing more, and say so at once. The lease is kept for what still runs."""
        self.is_stopping = True
        self._on_reset()

    async def run(self) -> None:
        """Pull for ever. Ends only by being cancelled."""
        prefix = f"{inbox_prefix(self._link.executor_id)}.{self._session}"
        await self._link.client.subscribe(f"{prefix}.*", cb=self._receive)
        while True:
            await self._may_pull()
            offer = await self._send(prefix)
            if offer is None or not await self._answer(offer):
                await self._pause(self._backoff.next_s())

    async def _may_pull(self) -> None:
        while not self._link.is_connected or (self._spool.room == 0 and not self.is_stopping):
            self._poke.clear()
            await self._wait(0.5)

    def _offer(self) -> _Offer:
        if self.is_stopping or self.is_drained or self._kill.stops_device or self._is_paused():
            return _Offer(0, 0)
        slots_free = self._attempts.slots_free
        return _Offer(slots_free, self._attempts.ahead(slots_free))

    async def _send(self, prefix: str) -> _Offer | None:
        """Send a pull; return what it offers, or None when it could not be sent."""
        # What else happens in this turn of the loop goes with this pull instead of asking for another.
        await asyncio.sleep(0)
        self._sequence += 1
        self._was_reset = False
        self._failure = ""
        self._poke.clear()
        offer = self._offer()
        body = PullRequest(
            session=self._session,
            sequence=self._sequence,
            slots_free=offer.slots_free,
            ahead=offer.ahead,
            memory_free_bytes=self._attempts.memory_free_bytes,
            held=self._attempts.keys,
            spooled=self._spool.keys,
            draining=self.is_stopping or self.is_drained,
            kill_epoch=self._kill.epoch,
        )
        self._sent[self._sequence] = _Sent(self._clock.boot_ms(), time.perf_counter())
        if len(self._sent) > _SENT_MAX:
            self._sent.popitem(last=False)
        subject = pull_subject(self._link.executor_id)
        try:
            await self._link.client.publish(subject, msgspec.json.encode(body), reply=f"{prefix}.{self._sequence}")
        except (nats.errors.Error, OSError) as error:
            log.info("%s: %s", subject, error or type(error).__name__)
            PULLS.labels("unsent").inc()
            return None
        return offer

    async def _answer(self, offer: _Offer) -> bool:
        """Wait until the pull that was just sent is answered or not worth waiting for.

        Returns whether the next one may follow at once.
        """
        until_s = time.monotonic() + PULL_TIMEOUT_S
        while True:
            left_s = until_s - time.monotonic()
            if left_s <= 0 or not await self._wait(left_s):
                PULLS.labels("unanswered").inc()
                return False
            self._poke.clear()
            if self._answered >= self._sequence:
                if self._failure:
                    return False
                self._backoff.reset()
                return True
            if self._was_reset:
                PULLS.labels("reset").inc()
                return True
            # One that offers a slot is answered with work as soon as there is any, and then the next one follows.
            # Where all that it offers is to wait here, not all work comes for that.
            now = self._offer()
            if (offer.slots_free == 0 and now.slots_free > 0) or (not offer.has_slot and now.has_slot):
                PULLS.labels("replaced").inc()
                return True

    async def _receive(self, message: Msg) -> None:
        token = message.subject.rpartition(".")[2]
        sequence = int(token) if token.isdecimal() else 0
        sent = self._sent.pop(sequence, None)
        if sent is None:
            return
        if message.headers and message.headers.get(nats.js.api.Header.STATUS) == _NO_RESPONDERS:
            self._settle(sequence, "no_scheduler")
            return
        try:
            reply = _decode(message.data)
        except msgspec.DecodeError as error:
            log.error("the answer to a pull does not fit: %s", error)
            self._settle(sequence, "invalid")
            return
        PULL_DURATION.observe(time.perf_counter() - sent.at_s)
        self._settle(sequence, self._apply(reply, sent))

    def _settle(self, sequence: int, failure: str) -> None:
        PULLS.labels(failure or "ok").inc()
        if sequence > self._answered:
            self._answered, self._failure = sequence, failure
        self._poke.set()

    def _apply(self, reply: PullReply, sent: _Sent) -> str:
        """Do what a reply says; return why it failed, or nothing."""
        if reply.v != _VERSION:
            log.error("the answer to a pull has version %d; expected %d", reply.v, _VERSION)
            return "invalid"
        if reply.error is not None:
            log.warning("pull: %s: %s", reply.error.code, reply.error.message)
            if reply.error.code == PermissionDenied.code:
                self._on_refused()
            return "error"
        if reply.superseded:
            self._on_superseded()
            return "superseded"
        if reply.unknown:
            self._greet()
            return "unknown"
        if not self._link.saw_epoch(reply.epoch):
            return "old_epoch"
        self._kill.told(reply.kill)
        self._signers.wanted(reply.signers)
        self._lease.renew(sent.boot_ms, reply.lease_ms)
        self.is_drained = reply.drained
        self._attempts.discard(reply.cancel)
        for assignment in reply.assignments:
            self._attempts.take(assignment)
        return ""

    async def _wait(self, timeout_s: float) -> bool:
        """Wait for a poke; return whether one came."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._poke.wait()
        except TimeoutError:
            return False
        return True

    async def _pause(self, wait_s: float) -> None:
        """Wait before asking again, unless the scheduler or the connection changes."""
        until_s = time.monotonic() + wait_s
        while not self._was_reset and (left_s := until_s - time.monotonic()) > 0:
            self._poke.clear()
            await self._wait(left_s)

    def _on_reset(self) -> None:
        self._was_reset = True
        self._poke.set()
