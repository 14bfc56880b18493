"""Makes `time.sleep` of many short sleeps: nothing ends a guest while it sleeps in the engine, only between two."""

import time

# To wake up costs 0.13 ms of CPU on a busy machine. Who has slept for long can wait a little longer for its end.
_SLICE_S = 0.025
_LATER_SLICE_S = 0.05
_LATER_S = 1.0
# Beyond 31 years the interpreter may decide what is too much.
_ALL_S = 1e9

_sleep = time.sleep
_monotonic = time.monotonic


# As a built-in function, it does not become a method of the class that it is an attribute of.
@staticmethod
def _sleep_in_slices(seconds: float, /) -> None:
    """sleep(seconds)

    Delay execution for a given number of seconds, which may be a fraction for subsecond precision.
    """
    if not isinstance(seconds, int | float) or not _SLICE_S < seconds < _ALL_S:
        _sleep(seconds)  # also refuses what is no time
        return
    now = began = _monotonic()
    until = began + seconds
    while now < until:
        _sleep(min(until - now, _SLICE_S if now - began < _LATER_S else _LATER_SLICE_S))
        now = _monotonic()


def install() -> None:
    """Replace `time.sleep`; before anything is imported that takes it from there."""
    _sleep_in_slices.__name__ = _sleep_in_slices.__qualname__ = "sleep"
    time.sleep = _sleep_in_slices
