"""A kill key of a test, and orders that it gives one after the other."""

from hive_common.contracts.events import KillOrdered
from hive_common.contracts.messages import KillOrder
from hive_common.control import keys
from hive_common.control.orders import Action, Order, Scope, following


class KillKey:
    """Signs orders with rising epochs.

    Attributes:
        public: as configurations have it.
        last: the order that was given last.
    """

    def __init__(self) -> None:
        self.pem = keys.new_key()
        self._key = keys.private_key(self.pem, "the key of a test")
        self.public = keys.public_text(self._key)
        self.last: Order | None = None

    def give(self, action: Action, scope: Scope, target: str = "", reason: str = "") -> KillOrder:
        """Return the next order."""
        self.last = following(self.last, action, scope, target, reason, 1)
        return keys.sign(self._key, self.last)

    def kill(self, scope: Scope, target: str = "", reason: str = "") -> KillOrder:
        """Return an order that stops something."""
        return self.give("kill", scope, target, reason)

    def lift(self, scope: Scope, target: str = "") -> KillOrder:
        """Return an order that lifts another one."""
        return self.give("lift", scope, target)

    def event(self, signed: KillOrder) -> KillOrdered:
        """Return the newest order as the registry writes it into the log."""
        assert self.last is not None
        return KillOrdered(epoch=self.last.epoch, order=signed.order, signature=signed.signature)
