"""TCP ports of an installation: chosen once, recorded in `hive.json`, and checked before every start."""

import errno
import random
import socket
from collections.abc import Iterable
from pathlib import Path

from hive_common.kernel.errors import FailedPrecondition, Unavailable

HOST = "127.0.0.1"
PREFERRED = {"http": 8500, "grpc": 8501, "nats": 4222}
PUBLIC = ("http", "grpc", "nats")
"""What listens at the address that other machines use too, where there is one."""
_LOWEST = 15_000
_HIGHEST = 32_000
_RANGE_FILE = Path("/proc/sys/net/ipv4/ip_local_port_range")
_TRIES = 200


def is_free(port: int, host: str = HOST) -> bool:
    """Say whether `port` of an IP address is not taken now: of one that is not ours it never is."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        # As servers do: what is left of closed connections does not count as taken.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen(1)
        except OSError as error:
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                return False
            if error.errno != errno.EADDRNOTAVAIL:
                raise
    return True


def pick(
    names: list[str], taken: dict[str, int], *, preferred: bool = True, addresses: Iterable[str] = ()
) -> dict[str, int]:
    """Return a port for each of `names`: the preferred one where it is free, else any free one.

    Args:
        names: such as `http`; those in `PREFERRED` have a port they like.
        taken: ports that are given away already.
        preferred: without it nobody gets the port they like. Of two installations that start at the same moment
            both would find it free.
        addresses: where the ports have to be free besides the loopback.

    Raises:
        Unavailable: no free port was found.
    """
    chosen, hosts = dict(taken), (HOST, *addresses)
    for name in names:
        used = set(chosen.values())
        liked = PREFERRED.get(name) if preferred else None
        if liked is not None and liked not in used and _is_free_at(liked, hosts):
            chosen[name] = liked
        else:
            chosen[name] = _any_free(used, hosts)
    return {name: chosen[name] for name in names}


def _is_free_at(port: int, hosts: Iterable[str]) -> bool:
    return all(is_free(port, host) for host in hosts)


def _any_free(used: set[int], hosts: Iterable[str]) -> int:
    # Below the range that outgoing connections draw from: one of those could otherwise sit on the port in the
    # moment in which a server is restarted.
    highest = min(_HIGHEST, _ephemeral_start() - 1)
    lowest = min(_LOWEST, highest - 1_000)
    for _ in range(_TRIES):
        port = random.randint(lowest, highest)  # noqa: S311 - not a secret
        if port not in used and _is_free_at(port, hosts):
            return port
    raise Unavailable(f"no free port found between {lowest} and {highest}")


def _ephemeral_start() -> int:
    try:
        return max(int(_RANGE_FILE.read_text().split()[0]), 3_000)
    except (OSError, ValueError, IndexError):
        return 49_152  # RFC 6335, section 6


def check_recorded(ports: dict[str, int], settings_file: Path) -> None:
    """Make sure that every recorded port can be listened on.

    Raises:
        FailedPrecondition: names the port, what it is for, and the file it is recorded in.
    """
    for name, port in ports.items():
        if not is_free(port):
            raise FailedPrecondition(
                f"port {port} ({name}) is taken by another program; it is recorded in {settings_file} "
                f"($.ports.{name}): stop that program, or write another port there",
                port=port,
                file=str(settings_file),
            )


def check_public(ports: dict[str, int], addresses: Iterable[str], settings_file: Path) -> None:
    """Make sure that what other machines connect to can be listened on, at the addresses that they use.

    Raises:
        FailedPrecondition: names the port, the address, and the file that the port is recorded in.
    """
    for address in addresses:
        for name in PUBLIC:
            if not is_free(ports[name], address):
                raise FailedPrecondition(
                    f"--public: port {ports[name]} ({name}) of {address} is taken by another program: stop that "
                    f"program, or write another port into {settings_file} ($.ports.{name})",
                    port=ports[name],
                    address=address,
                    file=str(settings_file),
                )
