"""What guests say of how far they are. No permission is needed, and little of it leaves the device."""

import asyncio
from collections.abc import Callable
from typing import Final

import msgspec
from hive_common.contracts.limits import PROGRESS_STEP_PERMILLE
from hive_common.kernel.errors import InvalidArgument

OPERATION: Final = "mark"
PAUSE_MS: Final = 100
"""Between two marks of an attempt that leave."""


class _Mark(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    fraction: float


class Marks:
    """Lets few of the marks of an attempt out: the first at once, then the newest after each pause if it is news.

    News is what passed a further step of the work (`PROGRESS_STEP_PERMILLE`), so that it is 21 at most.

    Args:
        tell: takes what leaves, in thousandths of the work.
    """

    def __init__(self, tell: Callable[[int], None]) -> None:
        self._tell = tell
        self._said = 0
        self._next_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self.told = 0
        """What left last; 0: nothing."""

    def said(self, permille: int) -> None:
        """Take what the guest says."""
        self._said = permille
        step = PROGRESS_STEP_PERMILLE
        is_news = not self.told or permille // step > self.told // step
        if self._timer is None and is_news:
            loop = asyncio.get_running_loop()
            wait_s = self._next_s - loop.time()
            if wait_s <= 0:
                self._let_out()
            else:
                self._timer = loop.call_later(wait_s, self._let_out)

    def close(self) -> None:
        """Tell nothing more: the attempt has ended."""
        if self._timer is not None:
            self._timer.cancel()

    def _let_out(self) -> None:
        self._timer = None
        self._next_s = asyncio.get_running_loop().time() + PAUSE_MS / 1000
        self.told = self._said
        self._tell(self.told)


class ProgressAccess:
    """Takes the marks of one attempt.

    Args:
        said: takes each of them, in thousandths of the work, 1 at least.
    """

    def __init__(self, said: Callable[[int], None]) -> None:
        self._said = said
        self._last = 0.0

    async def call(self, operation: str, request: bytes, left_ms: int) -> bytes:
        """Take one mark; see `Capability`.

        Raises:
            InvalidArgument: the request, or less than was said before.
        """
        if operation != OPERATION:
            raise InvalidArgument(f"progress.{operation} does not exist; expected {OPERATION}")
        try:
            fraction = msgspec.json.decode(request, type=_Mark).fraction
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidArgument(f"the request is not what this takes: {error}") from error
        if not 0 < fraction <= 1:
            raise InvalidArgument(f"fraction: got {fraction}; expected more than 0, and 1 at most")
        if fraction < self._last:
            raise InvalidArgument(f"fraction: got {fraction}; expected {self._last} or more, which was said before")
        self._last = fraction
        self._said(permille_of(fraction))
        return b"{}"


def permille_of(fraction: float) -> int:
    """Return a fraction in thousandths, rounded down, and 1 at least."""
    # 0.29 x 1000 is a little less than 290.
    return max(1, int(fraction * 1000 + 1e-6))
