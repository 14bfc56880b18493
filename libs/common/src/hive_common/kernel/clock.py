"""Time: microseconds UTC in events, ISO 8601 at the edges, and a clock that runs through suspend for leases."""

import time
from datetime import UTC, datetime
from typing import Protocol

_BOOT_CLOCK: int = getattr(time, "CLOCK_BOOTTIME", time.CLOCK_MONOTONIC)


class Clock(Protocol):
    """Where time comes from. Domain code takes times as arguments and never sees a clock."""

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC."""
        ...

    def boot_ms(self) -> int:
        """Milliseconds on a clock that never jumps and also counts while the machine sleeps."""
        ...


class SystemClock:
    """The clocks of this machine."""

    def now_us(self) -> int:
        """Microseconds since the epoch, UTC."""
        return time.time_ns() // 1000

    def boot_ms(self) -> int:
        """Milliseconds since boot, suspend included.

        macOS counts suspend in CLOCK_MONOTONIC; Linux only in CLOCK_BOOTTIME.
        """
        return time.clock_gettime_ns(_BOOT_CLOCK) // 1_000_000


def iso(ts_us: int) -> str:
    """Render microseconds since the epoch as ISO 8601 in UTC, such as `2026-11-25T17:40:00.000001Z`."""
    stamp = datetime.fromtimestamp(ts_us // 1_000_000, UTC).replace(microsecond=ts_us % 1_000_000)
    return stamp.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
