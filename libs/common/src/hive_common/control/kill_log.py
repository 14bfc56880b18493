"""Kill orders as the log has them, followed by every service that enforces them."""

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from hive_common.contracts import events
from hive_common.contracts.messages import KillOrder
from hive_common.control.orders import ALL, Order, in_words, options_of
from hive_common.control.verifier import Verifier
from hive_common.eventlog.log import LogReader, Stored
from hive_common.kernel.errors import FailedPrecondition, HiveError
from hive_common.kernel.ids import derive_id

log = logging.getLogger(__name__)

TYPES: Final = ("KillOrdered",)


def stream_of(ns: str) -> str:
    """Return the stream of a namespace's kill orders."""
    return derive_id("kill", ns)


class KillLog:
    """Follows the orders. Also what stands in the log is obeyed only if its signature is good.

    Args:
        reader: of the log.
        ns: the namespace.
        key: public key of the orders, as `Verifier` takes it.
        on_order: called after each order that is taken.
    """

    def __init__(
        self, reader: LogReader, ns: str, key: str, on_order: Callable[[Order], None] = lambda _: None
    ) -> None:
        self._reader = reader
        self._stream = stream_of(ns)
        self.on_order = on_order
        self._lock = asyncio.Lock()
        self._reasons: dict[str, Order] = {}
        self._killed: dict[str, int] = {}
        self.verifier = Verifier(key)
        self.version = 0
        """At which the stream stands, as far as it was read."""
        self.position = 0
        self.wake = asyncio.Event()
        """To be set whenever the log may have a new order."""

    @property
    def standing(self) -> dict[str, Order]:
        """Return what is stopped, each with the order that stopped it, in order of their epochs."""
        return dict(self._reasons)

    def ended(self, executor: str, name: str, version: str, job: str, epoch: int) -> str | None:
        """Return the entry by which an attempt was stopped since the order of `epoch`, also if that was lifted."""
        entries = (ALL, f"executor:{executor}", f"agent:{name}", f"agent:{name}@{version}", f"job:{job}")
        return next((entry for entry in entries if self._killed.get(entry, 0) > epoch), None)

    def words(self, entry: str) -> str:
        """Return which order an entry stands by, and its reason, for people."""
        order = self._reasons.get(entry)
        if order is None:
            return "by a kill order"
        return f"by kill order {order.epoch}" + (f" ({order.reason})" if order.reason else "")

    def refusal(self, entry: str) -> FailedPrecondition:
        """Return the error of what an entry stops, with the command that lifts it."""
        words = f"{in_words(entry)} is stopped {self.words(entry)}; lift that with: hive unkill {options_of(entry)}"
        return FailedPrecondition(words, reason="killed", entry=entry)

    async def catch_up(self, epoch: int | None = None) -> None:
        """Read what is new; nothing where the order of `epoch` is known by then. Raises Unavailable."""
        async with self._lock:
            while epoch is None or self.verifier.epoch < epoch:
                scan = await self._reader.scan(self.position, types=TYPES)
                self._take(scan.events)
                self.position = scan.through
                if not scan.events or scan.through >= await self._reader.head():
                    return

    async def follow(self) -> None:
        """Follow the log until cancelled."""
        async for scan in self._reader.scans(self.position, wake=self.wake, types=TYPES):
            async with self._lock:
                self._take([stored for stored in scan.events if stored.position > self.position])
                self.position = max(self.position, scan.through)

    def _take(self, batch: list[Stored]) -> None:
        for stored in batch:
            if stored.stream != self._stream:
                continue
            self.version = stored.version
            if stored.payload is None:
                log.error("position %d: the kill order is gone; those after it count", stored.position)
                continue
            event = events.decode(stored.type, stored.schema, stored.payload)
            assert isinstance(event, events.KillOrdered)
            try:
                order = self.verifier.take(KillOrder(order=event.order, signature=event.signature))
            except HiveError as error:
                log.error("position %d: the kill order is not obeyed: %s", stored.position, error.message)
                continue
            self._remember(order)
            self.on_order(order)

    def _remember(self, order: Order) -> None:
        if order.action == "kill":
            self._reasons[order.entry] = order
            self._killed[order.entry] = order.epoch
        self._reasons = {entry: by for entry, by in self._reasons.items() if entry in order.standing}
