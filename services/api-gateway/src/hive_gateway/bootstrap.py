"""Builds the gateway from its configuration, runs it, and takes it down in order."""

import asyncio
import logging
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from hive_common.artifacts.store import FolderStore
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument
from hive_common.ops.config import ServiceConfig, read_secret
from hive_common.ops.lifecycle import Stop
from hive_common.ops.telemetry import Health, OpsServer
from hive_common.ops.tls import server_context

from hive_gateway.app import build_api, guarded
from hive_gateway.completer import RouterCompleter
from hive_gateway.devices import Devices
from hive_gateway.doors import Door
from hive_gateway.grpc_proxy import PublicRpc
from hive_gateway.holders import Holders
from hive_gateway.http_server import HttpServer
from hive_gateway.intake import Intake
from hive_gateway.keys import KeyRing
from hive_gateway.live_logs import LiveLogs
from hive_gateway.peers import Peers
from hive_gateway.settings import settings_of
from hive_gateway.streams import Followers

log = logging.getLogger(__name__)


class Gateway:
    """The whole service, built but not started.

    Attributes:
        http_port: where REST listens, once started.
        grpc_port: where gRPC listens, once started.
        doors: listeners off the loopback.
    """

    def __init__(self, config: ServiceConfig) -> None:
        settings = self._settings = settings_of(config)
        ring = KeyRing.load(settings.keys, config.owner)
        self.health = Health()
        self.peers = Peers(config.peers, read_secret(config.service_key_file))
        keys = Holders(ring, self.peers)
        self.live_logs = LiveLogs()
        self.followers = Followers()
        self._nats = config.nats
        self.intake = Intake(self.peers)
        store = FolderStore(config.artifacts_dir)
        ca = _certificate(settings.ca_file) if settings.ca_file else ""
        api = build_api(
            self.peers, self.intake, store, self.live_logs, self.followers, self.health, ca, self._url, keys.forget
        )
        without_key = ring.without_key(config.owner) if settings.ollama_without_key else None
        devices = Devices(self.peers, SystemClock())
        self.completer = RouterCompleter(self.peers)
        app = guarded(api, keys, devices, self.intake, store, self.completer, without_key)
        self._http = HttpServer(app, settings.http_host, settings.http_port)
        self._rpc = PublicRpc(self.peers, keys, config.grpc_host, config.grpc_port)
        self.doors: list[Door] = []
        if settings.tls is not None:
            pair = settings.tls.pair
            server_context(pair.cert_file, pair.key_file)  # says what is wrong with them
            self.doors = [
                Door(
                    HttpServer(app, host, settings.http_port, pair),
                    PublicRpc(self.peers, keys, host, config.grpc_port, pair),
                    host,
                )
                for host in settings.tls.hosts
            ]
        self.http_port = self.grpc_port = 0
        for peer in self.peers.all:
            self.health.add(peer.name, peer.problem)
        self.health.add("gateway", self._stopping)

    async def start(self, stop: Stop, stack: AsyncExitStack) -> None:
        """Start everything; `stack` takes it down again, the last first.

        Raises:
            FailedPrecondition: a port is taken.
        """
        stack.push_async_callback(self.live_logs.close)
        stack.push_async_callback(self.completer.close)
        self._background(self.peers.watch_health(), "health of peers", stop, stack)
        self._background(self.live_logs.connect(self._nats), "connection to NATS", stop, stack)
        stack.push_async_callback(self._rpc.stop)
        self.grpc_port = await self._rpc.start()
        self.http_port = await self._http.start()
        stack.push_async_callback(self._http.stop)
        assert self._http.task is not None
        stop.guard(self._http.task)
        for door in self.doors:
            stack.push_async_callback(door.close)
            if not await door.open(stop):
                self._background(door.open_later(stop), f"listeners on {door.host}", stop, stack)
        # Streams end first: the servers wait for what is open.
        stack.callback(self.followers.stopping.set)

    def _background(self, work: Coroutine[Any, Any, None], name: str, stop: Stop, stack: AsyncExitStack) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        stop.guard(task)

        async def end() -> None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

        stack.push_async_callback(end)

    def _url(self) -> str:
        return self._settings.public_url or f"http://{self._settings.http_host}:{self.http_port}"

    def _stopping(self) -> str | None:
        return "the gateway stops" if self.followers.stopping.is_set() else None


def _certificate(file: str) -> str:
    try:
        return Path(file).read_text()
    except OSError as error:
        raise InvalidArgument(f"{file}: cannot be read: {error.strerror}", file=file) from error


async def main(config: ServiceConfig, stop: Stop) -> None:
    """Run the gateway until `stop` is set.

    Raises:
        InvalidArgument: the configuration or a key file is not usable.
        FailedPrecondition: a port is taken.
    """
    gateway = Gateway(config)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(gateway.peers.close)
        ops = OpsServer(gateway.health, config.ops_host, config.ops_port)
        try:
            await ops.start()
        except OSError as error:
            raise FailedPrecondition(
                f"{config.ops_host}:{config.ops_port}: cannot listen for health and metrics: {error.strerror}"
            ) from error
        stack.push_async_callback(ops.stop)
        await gateway.start(stop, stack)
        log.info("REST on port %d, gRPC on port %d", gateway.http_port, gateway.grpc_port)
        await stop.wait()
