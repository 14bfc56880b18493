"""Where the processes of an installation listen, and how they reach each other."""

from collections.abc import Iterable
from dataclasses import dataclass

from hive_common.ops.ports import HOST

from hive_cli.supervisor import names, ports

_CONTAINER_PORTS = {
    "http": 8500,
    names.grpc_port(names.GATEWAY): 8501,
    "nats": 4222,
    "nats_monitor": 8222,
    "postgres": 5432,
}
_PEER_PORT = 8501
_OPS_PORT = 9100


@dataclass(frozen=True)
class Network:
    """A place where all processes of an installation can reach each other.

    Args:
        listen: address that servers listen on.
        by_name: every process has a host of its own, named after it, as containers do. Else all share one.
    """

    listen: str
    by_name: bool = False

    def host(self, process: str) -> str:
        """Return the host at which others reach `process`."""
        return process if self.by_name else self.listen

    def pick_ports(
        self, wanted: list[str], taken: dict[str, int], *, preferred: bool = True, addresses: Iterable[str] = ()
    ) -> dict[str, int]:
        """Return a port for each of `wanted`, as `ports.pick` does; on hosts of their own, the usual ones.

        Raises:
            Unavailable: no free port was found.
        """
        if not self.by_name:
            return ports.pick(wanted, taken, preferred=preferred, addresses=addresses)
        return {name: _container_port(name) for name in wanted}


def _container_port(name: str) -> int:
    return _CONTAINER_PORTS.get(name, _PEER_PORT if name.endswith("_grpc") else _OPS_PORT)


LOOPBACK = Network(HOST)
"""One machine, nothing reachable from outside."""

CONTAINERS = Network("0.0.0.0", by_name=True)  # noqa: S104 - of a network of the engine; what is published is said there
"""A network of a container engine, which resolves the names of services."""
