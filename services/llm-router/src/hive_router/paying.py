"""What one call has reserved at a provider, and what became of that."""

from hive_common.inference.tally import Tally
from hive_common.kernel.errors import HiveError

from hive_router.domain.budgets import Amount
from hive_router.metrics import COST
from hive_router.providers import Bounded, cost_nothing
from hive_router.treasury import Hold


class Reserved:
    """The reservation of one try. The first of its ends counts. `provider` is empty where only tokens are counted.

    Attributes:
        bounded: the call as it goes to the provider.
        cost: of the try, once it has ended.
        estimated: the answer did not say, so that the reservation is the cost. Where only tokens are counted it
            never says so: nothing was paid, and another back end may be tried.
        block: whose blocks pay.
    """

    __slots__ = ("_hold", "_over", "_provider", "block", "bounded", "cost", "estimated")

    def __init__(self, hold: Hold, bounded: Bounded, provider: str, block: str) -> None:
        self._hold = hold
        self._provider = provider
        self._over = False
        self.bounded = bounded
        self.block = block
        self.cost = Amount()
        self.estimated = False

    def answered(self, tally: Tally) -> None:
        """End it: the answer has come to its end, and may say what it used."""
        if tally.done and (tally.prompt_tokens or tally.completion_tokens):
            self._end(self.bounded.cost(tally.prompt_tokens, tally.completion_tokens))
        else:
            self.unknown()

    def failed(self, error: HiveError) -> None:
        """End it: there was no answer."""
        if cost_nothing(error):
            self._end(Amount())
        else:
            self.unknown()

    def unknown(self) -> None:
        """End it: something may have been generated, and nobody says how much."""
        if not self._over:
            self.estimated = bool(self._provider)
            self._end(self._hold.need)

    def _end(self, cost: Amount) -> None:
        if self._over:
            return
        self._over = True
        self.cost = cost
        self._hold.settle(cost)
        if self._provider:
            COST.labels(self._provider).inc(cost.nano_usd)
