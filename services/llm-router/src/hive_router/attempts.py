"""What attempts generate: all calls of one together no more than was granted (`permissions.model.max_tokens`)."""

from collections import OrderedDict
from typing import Final

import msgspec
from hive_common.inference.calls import ModelCall
from hive_common.kernel.errors import BudgetExhausted

from hive_router.flight import CANCELLED, Flight

REMEMBERED: Final = 20_000
"""Attempts, those forgotten first whose last call is the longest ago."""

_Key = tuple[str, str, int]


class Attempts:
    """Counts what attempts have generated through this router, since it was started.

    The executor counts as well, its own models included; this holds for one that does not.

    Args:
        remembered: attempts that are counted at once.
    """

    def __init__(self, remembered: int = REMEMBERED) -> None:
        self._remembered = remembered
        self._spent: OrderedDict[_Key, int] = OrderedDict()

    def reserve(self, call: ModelCall) -> ModelCall:
        """Return a call with what is left for it, which is set aside until `ended` or `release`.

        Raises:
            BudgetExhausted: nothing is left.
        """
        most = call.attempt_tokens_max
        if not most:
            return call
        key = _key(call)
        spent = self._spent.get(key, 0)
        if spent >= most:
            raise BudgetExhausted(
                f"{spent} of the {most} tokens of this attempt are used up (`permissions.model.max_tokens`)",
                limit=most,
                spent=spent,
            )
        reserved = min(call.tokens_max, most - spent)
        self._spent[key] = spent + reserved
        self._spent.move_to_end(key)
        if len(self._spent) > self._remembered:
            self._spent.popitem(last=False)
        return msgspec.structs.replace(call, tokens_max=reserved)

    def release(self, call: ModelCall) -> None:
        """Give back what was set aside: nothing was generated."""
        self._settle(call, 0)

    def ended(self, flight: Flight) -> None:
        """Count what a call has generated; all that it might have, where nobody says."""
        tally = flight.tally
        if tally.done and (tally.prompt_tokens or tally.completion_tokens):
            self._settle(flight.call, tally.completion_tokens)
        elif flight.code in ("", CANCELLED) or flight.streamed or flight.estimated:
            return
        else:
            self._settle(flight.call, 0)

    def _settle(self, call: ModelCall, used: int) -> None:
        key = _key(call)
        if call.attempt_tokens_max and key in self._spent:
            self._spent[key] += used - call.tokens_max


def _key(call: ModelCall) -> _Key:
    return call.job, call.task, call.attempt
