"""Stands where calls would go if there was a way: each call fails with the reason why there is none."""

from collections.abc import Sequence

from hive_common.contracts.events import Model
from hive_common.inference.calls import Answer, ModelCall
from hive_common.kernel.errors import Unavailable


class Unreachable:
    """A completer that serves nothing.

    Args:
        why: one sentence that says what to do about it.
    """

    def __init__(self, why: str) -> None:
        self._why = why

    async def complete(self, call: ModelCall) -> Answer:
        """Refuse."""
        raise Unavailable(self._why)

    async def models(self) -> Sequence[Model]:
        """Refuse."""
        raise Unavailable(self._why)
