"""Where a name leads, looked up once, and which addresses a guest's request may go to."""

import asyncio
import ipaddress
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from hive_common.kernel.errors import Unavailable

ADDRESSES_MAX: Final = 16
"""Of one name; the rest is left out."""

_THREADS: Final = 8

_CARRIERS: Final = tuple(
    (kind, ipaddress.ip_network(network))
    for kind, network in (
        ("IPv4-mapped (RFC 4291)", "::ffff:0:0/96"),
        ("IPv4-compatible (RFC 4291)", "::/96"),
        ("6to4 (RFC 3056)", "2002::/16"),
        ("Teredo (RFC 4380)", "2001::/32"),
        ("NAT64 (RFC 6052)", "64:ff9b::/96"),
        ("NAT64 (RFC 8215)", "64:ff9b:1::/48"),
    )
)
"""IPv6 in which an IPv4 address travels: where that leads is up to the network, so all of it counts as private."""

_METADATA: Final = frozenset(map(ipaddress.ip_address, ("169.254.169.254", "fd00:ec2::254", "168.63.129.16")))
"""What tells programs in clouds their secrets. The last one is a public address, but only to look at."""

_SPECIAL: Final = tuple(
    (kind, ipaddress.ip_network(network))
    for kind, network in (
        ("shared (RFC 6598)", "100.64.0.0/10"),
        ("6to4 relay (RFC 7526)", "192.88.99.0/24"),
        ("site-local (RFC 3879)", "fec0::/10"),
        ("special (RFC 6890)", "192.0.0.0/24"),
        ("special (RFC 6890)", "2001::/23"),
    )
)
"""IANA's registries of special addresses have more entries than this Python knows."""

_GLOBAL_UNICAST: Final = ipaddress.ip_network("2000::/3")


class Resolver(Protocol):
    """Looks names up."""

    async def addresses(self, name: str) -> Sequence[str]:
        """Return the addresses of a name, or of an address itself, in numbers.

        Raises:
            Unavailable: it cannot be looked up, or has none.
        """
        ...


class SystemResolver:
    """The resolver of the system, in threads of its own: names that hang keep nothing else from its threads."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="resolver")

    async def addresses(self, name: str) -> Sequence[str]:
        """Look a name up; see `Resolver`."""
        loop = asyncio.get_running_loop()
        try:
            found = await loop.run_in_executor(self._threads, _look_up, name)
        except (OSError, UnicodeError) as error:
            raise Unavailable(f"{name} cannot be looked up: {error}") from error
        return found[:ADDRESSES_MAX]

    def close(self) -> None:
        """Look nothing up any more. Does not wait for what hangs."""
        self._threads.shutdown(wait=False, cancel_futures=True)


def _look_up(name: str) -> list[str]:
    found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[4][0]) for address in found))


def problem_of(text: str, *, private: bool) -> str:
    """Return what kind of address it is that a request may not go to; empty where it may.

    Args:
        text: as the resolver gave it.
        private: addresses that only mean something near this device are allowed.
    """
    try:
        # With a zone it is an address of one link.
        address = ipaddress.ip_address(text.partition("%")[0])
    except ValueError:
        return "no address"
    if address.is_unspecified:
        return "unspecified"
    if address.is_multicast or address == ipaddress.ip_address("255.255.255.255"):
        return "multicast"
    return "" if private else _private_kind(address, has_zone="%" in text)


def _private_kind(address: ipaddress.IPv4Address | ipaddress.IPv6Address, *, has_zone: bool) -> str:
    if address in _METADATA:
        return "metadata service"
    if address.is_loopback:
        return "loopback"
    if address.is_link_local or has_zone:
        return "link-local"
    for kind, network in (*_CARRIERS, *_SPECIAL):
        if address.version == network.version and address in network:
            return kind
    if address.is_private:
        return "private"
    if address.version == _GLOBAL_UNICAST.version and address not in _GLOBAL_UNICAST:
        return "reserved"
    return "" if address.is_global and not address.is_reserved else "reserved"
