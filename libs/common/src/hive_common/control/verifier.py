"""What one process knows of kill orders: the newest one that it has verified."""

import base64
import binascii
import logging
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from prometheus_client import Counter, Gauge

from hive_common.contracts.messages import KillOrder
from hive_common.control.keys import public_key
from hive_common.control.orders import NOTHING, Order, Stopped, check_follows, parse_order, signed_bytes
from hive_common.kernel.errors import Conflict, HiveError, InvalidArgument, PermissionDenied
from hive_common.kernel.nkey import is_signed

log = logging.getLogger(__name__)

REFUSED: Final = Counter(
    "hive_kill_orders_refused_total", "Kill orders that were not obeyed, by the reason why", ["reason"]
)
EPOCH: Final = Gauge("hive_kill_epoch", "Epoch of the newest kill order that this process obeys")

MALFORMED: Final = "malformed"
FORGED: Final = "forged"
REPLAYED: Final = "replayed"
LOWER_EPOCH: Final = "lower_epoch"
NO_KEY: Final = "no_key"
REASONS: Final = (MALFORMED, FORGED, REPLAYED, LOWER_EPOCH, NO_KEY)
for _reason in REASONS:
    REFUSED.labels(_reason)


class Verifier:
    """Takes orders whose signature is good and whose epoch is higher than that of all before.

    Args:
        key: public key in base64; empty where this process was given none: then every order is refused.

    Raises:
        InvalidArgument: the key is none.
    """

    def __init__(self, key: str) -> None:
        self._key: Ed25519PublicKey | None = public_key(key) if key else None
        self.signed: KillOrder | None = None
        """The newest order, for whoever does not have it yet."""
        self.order: Order | None = None
        self.stopped: Stopped = NOTHING
        """What is stopped now."""

    @property
    def epoch(self) -> int:
        """Return the epoch of the newest order, 0 before the first."""
        return self.order.epoch if self.order else 0

    def take(self, signed: KillOrder) -> Order:
        """Obey an order from here on, and return it.

        Raises:
            InvalidArgument, PermissionDenied, Conflict: it is refused, and counted; `reason` says why.
        """
        order = self.check(signed)
        self.signed, self.order, self.stopped = signed, order, Stopped(order.standing)
        EPOCH.set(order.epoch)
        return order

    def take_if_new(self, signed: KillOrder | None) -> Order | None:
        """Take an order as `take` does where it is not the known one; None where it is, or is refused."""
        if signed is None or signed == self.signed:
            return None
        try:
            return self.take(signed)
        except HiveError as error:
            log.warning("a kill order is refused: %s", error.message)
            return None

    def check(self, signed: KillOrder) -> Order:
        """Return the order, if it may be obeyed. Raises as `take`."""
        if self._key is None:
            raise _refused(PermissionDenied, NO_KEY, "this process has no key to verify kill orders with")
        data = signed.order.encode()
        if not is_signed(_signature(signed.signature), signed_bytes(data), self._key):
            raise _refused(PermissionDenied, FORGED, "the order is not signed with this installation's kill key")
        try:
            order = parse_order(data)
        except InvalidArgument as error:
            raise _refused(InvalidArgument, MALFORMED, error.message) from error
        if order.epoch < self.epoch:
            raise self._old(LOWER_EPOCH, order)
        if order.epoch == self.epoch:
            raise self._old(REPLAYED, order)
        return order

    def check_next(self, signed: KillOrder) -> Order:
        """Return the order, if it is the one to follow the newest: for who decides what the next one is.

        Raises:
            HiveError: as `take` and `check_follows`; Conflict where an epoch is left out.
        """
        order = self.check(signed)
        if order.epoch != self.epoch + 1:
            raise Conflict(f"epoch: got {order.epoch}; expected {self.epoch + 1}", epoch=self.epoch)
        check_follows(self.order, order)
        return order

    def _old(self, reason: str, order: Order) -> HiveError:
        words = f"epoch {order.epoch} was used: the next order has {self.epoch + 1}"
        return _refused(Conflict, reason, words, epoch=self.epoch)


def _refused(kind: type[HiveError], reason: str, message: str, **fields: int) -> HiveError:
    REFUSED.labels(reason).inc()
    return kind(message, reason=reason, **fields)


def _signature(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        return b""
