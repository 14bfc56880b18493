"""Listeners off the loopback: REST and gRPC over TLS on an address that may come and go, as those of laptops do."""

import asyncio
import errno
import logging
import socket

from hive_common.ops.lifecycle import Stop

from hive_gateway.grpc_proxy import PublicRpc
from hive_gateway.http_server import HttpServer

log = logging.getLogger(__name__)

_LOOK_S = 2.0


class Door:
    """REST and gRPC on one address.

    Attributes:
        host: the address.
        http_port: where REST listens, once it does.
        grpc_port: where gRPC listens, once it does.
    """

    def __init__(self, http: HttpServer, rpc: PublicRpc, host: str) -> None:
        self.host = host
        self.http_port = self.grpc_port = 0
        self._http = http
        self._rpc = rpc

    async def open(self, stop: Stop) -> bool:
        """Listen, and say whether that is possible: not while this machine does not have the address.

        Raises:
            FailedPrecondition: a port is taken.
        """
        if not _is_ours(self.host):
            return False
        self.grpc_port = await self._rpc.start()
        self.http_port = await self._http.start()
        assert self._http.task is not None
        stop.guard(self._http.task)
        return True

    async def open_later(self, stop: Stop) -> None:
        """Listen as soon as this machine has the address again."""
        log.warning("%s is not an address of this machine now: other machines cannot connect", self.host)
        while not await self.open(stop):
            await asyncio.sleep(_LOOK_S)
        log.info("listening on %s again", self.host)

    async def close(self) -> None:
        """Take no more calls, give the others a moment, then cut them."""
        await asyncio.gather(self._http.stop(), self._rpc.stop())


def _is_ours(host: str) -> bool:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((host, 0))
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                return False
            raise
    return True
