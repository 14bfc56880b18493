"""TCP ports of an installation: chosen once, recorded in `hive.json`, and checked before every start."""

from collections.abc import Iterable
from pathlib import Path

from hive_common.kernel.errors import FailedPrecondition
from hive_common.ops.ports import HOST, free_port, is_free

PREFERRED = {"http": 8500, "grpc": 8501, "nats": 4222}
PUBLIC = ("http", "grpc", "nats")
"""What listens at the address that other machines use too, where there is one."""


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
            chosen[name] = free_port(hosts, but=used)
    return {name: chosen[name] for name in names}


def _is_free_at(port: int, hosts: Iterable[str]) -> bool:
    return all(is_free(port, host) for host in hosts)


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
