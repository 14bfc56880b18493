"""The time that counts against the limit of an attempt. It stands still while a person is asked."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager


class TimeLimit:
    """Counts the time of one guest, on the loop that runs it.

    Attributes:
        stood_s: for so long it stood still.
    """

    def __init__(self) -> None:
        self._deadline_s: float | None = None
        self._timers: dict[asyncio.Timeout, float] = {}
        self.stood_s = 0.0

    def begin(self, seconds: float) -> None:
        """Begin to count: so much time there is."""
        self._deadline_s = asyncio.get_running_loop().time() + seconds

    @property
    def left_s(self) -> float:
        """How much is left."""
        assert self._deadline_s is not None, "it has not begun"
        return max(0.0, self._deadline_s - asyncio.get_running_loop().time())

    @contextmanager
    def timer(self, slack_s: float) -> Iterator[asyncio.Timeout]:
        """Yield a timeout, to be entered at once, that ends `slack_s` after the time is up."""
        assert self._deadline_s is not None, "it has not begun"
        timeout = asyncio.timeout_at(self._deadline_s + slack_s)
        self._timers[timeout] = slack_s
        try:
            yield timeout
        finally:
            del self._timers[timeout]

    @contextmanager
    def standing(self) -> Iterator[None]:
        """Count nothing while the block runs."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        for timeout in self._timers:
            _move(timeout, None)
        try:
            yield
        finally:
            stood_s = loop.time() - began_s
            self.stood_s += stood_s
            if self._deadline_s is not None:
                self._deadline_s += stood_s
                for timeout, slack_s in self._timers.items():
                    _move(timeout, self._deadline_s + slack_s)


def _move(timeout: asyncio.Timeout, when_s: float | None) -> None:
    # One that has struck already cannot be moved: it came first.
    if not timeout.expired():
        timeout.reschedule(when_s)
