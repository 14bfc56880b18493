"""A circuit breaker: a back end that fails again and again is left alone for a while, then tried with one call.

closed ──failures in a row──→ open ──its time is up, one call──→ half_open ──success──→ closed
                               ↑                                    │
                               └──────── failure, twice as long ────┘
"""

from typing import Final, Literal

import msgspec


class BreakerLimits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """When a breaker opens: after `failures` in a row; it stays open for `open_ms`, doubled up to `open_ms_max`."""

    failures: int = 3
    open_ms: int = 1_000
    open_ms_max: int = 30_000


class Breaker(msgspec.Struct, frozen=True):
    """State of one breaker. `open_ms` is how long it was opened for last, on whatever clock the caller has."""

    state: Literal["closed", "open", "half_open"] = "closed"
    failures: int = 0
    until_ms: int = 0
    open_ms: int = 0


CLOSED: Final = Breaker()


def allows(breaker: Breaker, now_ms: int) -> bool:
    """Say whether a call may begin. While half open only the one that tries may, and it has begun."""
    return breaker.state == "closed" or (breaker.state == "open" and now_ms >= breaker.until_ms)


def begun(breaker: Breaker, now_ms: int) -> Breaker:
    """Return the state once a call has begun that `allows` let through. Half open: this call is the probe."""
    if breaker.state == "open" and now_ms >= breaker.until_ms:
        return msgspec.structs.replace(breaker, state="half_open")
    return breaker


def succeeded(breaker: Breaker, probe: bool) -> Breaker:
    """Return the state after a call went well. One that began before the breaker opened closes nothing."""
    return CLOSED if probe or breaker.state == "closed" else breaker


def failed(breaker: Breaker, probe: bool, now_ms: int, limits: BreakerLimits) -> Breaker:
    """Return the state after a call failed for reasons of the back end."""
    if probe:
        return _opened(min(2 * breaker.open_ms, limits.open_ms_max), now_ms)
    if breaker.state != "closed":
        return breaker
    if breaker.failures + 1 >= limits.failures:
        return _opened(limits.open_ms, now_ms)
    return Breaker(failures=breaker.failures + 1)


def abandoned(breaker: Breaker, probe: bool, now_ms: int) -> Breaker:
    """Return the state after a call that ended without a verdict: its caller went away. The next one may try."""
    if probe and breaker.state == "half_open":
        return msgspec.structs.replace(breaker, state="open", until_ms=now_ms)
    return breaker


def _opened(open_ms: int, now_ms: int) -> Breaker:
    return Breaker(state="open", until_ms=now_ms + open_ms, open_ms=open_ms)
