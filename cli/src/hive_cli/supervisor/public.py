"""The address under which other machines reach an installation: what may be one, and what listens for it."""

import ipaddress
import re
import socket

import psutil
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.tls import netloc

from hive_cli.home import Settings

_HOST_NAME = re.compile(r"(?=.{1,253}$)([a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)(\.[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?)*")
_EXPECTED = "expected an address of this machine that other machines can reach, such as 192.168.1.20 or desktop.lan"

Ip = ipaddress.IPv4Address | ipaddress.IPv6Address


def parsed(text: str) -> str:
    """Return an address as it is recorded and stands in certificates.

    Raises:
        InvalidArgument: it is no address, or one that no other machine can use.
    """
    text = text.strip().removeprefix("[").removesuffix("]").lower().removesuffix(".")
    ip = _ip(text)
    if ip is None:
        if not _HOST_NAME.fullmatch(text) or text.replace(".", "").isdigit():
            raise InvalidArgument(f"--public: {text!r} is neither an IP address nor a host name; {_EXPECTED}")
        if text == "localhost" or text.endswith(".localhost"):
            raise InvalidArgument(f"--public: {text} is this machine for itself only; {_EXPECTED}")
        return text
    if ip.is_unspecified:
        raise InvalidArgument(f"--public: {text} means every address, which is none to connect to; {_EXPECTED}")
    if ip.is_loopback:
        raise InvalidArgument(f"--public: {text} is this machine for itself only; {_EXPECTED}")
    if ip.is_multicast or (ip.version == 6 and ip.is_link_local):
        raise InvalidArgument(f"--public: {text} is not an address that a server can have; {_EXPECTED}")
    return str(ip)


def problem_of(address: str) -> str:
    """Return why a connection to a parsed `address` may not arrive here, or ""."""
    if _ip(address) is not None:
        return "" if address in local_addresses() else f"{address} is not an address of this machine"
    found = _resolved(address)
    if not found:
        return f"{address} cannot be resolved on this machine"
    if not found & set(local_addresses()):
        return f"{address} is {', '.join(sorted(found))} for this machine, which is not an address of it"
    return ""


def is_ip(address: str) -> bool:
    """Say whether a parsed address is an IP address, and no name."""
    return _ip(address) is not None


def listened(address: str) -> tuple[str, ...]:
    """Return the IP addresses to listen on for a parsed `address`.

    A name that stands for an address of something else, such as a router that forwards, may arrive at any of ours.
    """
    if is_ip(address):
        return (address,)
    ours = local_addresses()
    named = _resolved(address) & set(ours)
    return tuple(one for one in ours if one in named) or ours


def nats_host(address: str) -> str:
    """Return what NATS, which has one listener for everybody, binds so that `address` and the loopback reach it."""
    return "::" if any(":" in one for one in listened(address)) else "0.0.0.0"  # noqa: S104 - with TLS only


def url_for_others(settings: Settings) -> str:
    """Return the base URL of REST for the machines that may join: all, or only this one."""
    if not settings.public:
        return settings.endpoints.http
    return f"https://{netloc(settings.public, settings.ports['http'])}"


def nats_for_others(settings: Settings) -> str:
    """Return the URL of NATS for the same machines."""
    if not settings.public:
        return settings.endpoints.nats
    return f"tls://{netloc(settings.public, settings.ports['nats'])}"


def grpc_for_others(settings: Settings) -> str:
    """Return the address of gRPC for the same machines."""
    return netloc(settings.public, settings.ports["grpc"]) if settings.public else settings.endpoints.grpc


def local_addresses() -> tuple[str, ...]:
    """Return the IP addresses of this machine, without those of the loopback and of single links."""
    found = []
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            ip = _ip(entry.address) if entry.family in (socket.AF_INET, socket.AF_INET6) else None
            if ip is not None and not ip.is_loopback and not (ip.version == 6 and ip.is_link_local):
                found.append(str(ip))
    return tuple(dict.fromkeys(found))


def _ip(text: str) -> Ip | None:
    try:
        return ipaddress.ip_address(text)
    except ValueError:
        return None


def _resolved(name: str) -> set[str]:
    try:
        return {str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)}
    except OSError:
        return set()
