"""How often strangers may knock: a bound per address, in memory."""

import ipaddress
import time
from collections import OrderedDict
from typing import Final

from hive_common.kernel.errors import RateLimited

ADDRESSES_MAX: Final = 10_000


class AddressLimit:
    """A token bucket for each address; of IPv6 for each network of 64 bits, which one machine has to itself.

    Args:
        burst: calls at once.
        per_minute: calls on average.
    """

    def __init__(self, burst: int, per_minute: float) -> None:
        self._burst = burst
        self._per_s = per_minute / 60
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._buckets)

    def take(self, address: str, now_s: float | None = None) -> None:
        """Count one call.

        Args:
            address: of who calls.
            now_s: on a clock that never jumps; the one of this machine when left out.

        Raises:
            RateLimited: too many came from there. `retry_after_s` says how long to wait.
        """
        now_s = time.monotonic() if now_s is None else now_s
        key = _network(address)
        left, at_s = self._buckets.pop(key, (float(self._burst), now_s))
        left = min(float(self._burst), left + (now_s - at_s) * self._per_s)
        allowed = left >= 1
        self._buckets[key] = (left - 1 if allowed else left, now_s)
        if len(self._buckets) > ADDRESSES_MAX:
            self._buckets.popitem(last=False)
        if not allowed:
            wait_s = max(1, round((1 - left) / self._per_s))
            raise RateLimited(
                f"too many tries to join from this address; try again in {wait_s} s", retry_after_s=wait_s
            )


def _network(address: str) -> str:
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return address
    return str(ipaddress.ip_network((found, 64), strict=False))
