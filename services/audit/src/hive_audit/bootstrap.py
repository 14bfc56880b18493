"""Builds the audit service from its configuration, runs it, and takes it down."""

import asyncio
import contextlib
import sys
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Final, TypeVar

import msgspec
from hive_common.artifacts.store import FolderStore
from hive_common.bus.nats import connect
from hive_common.contracts.messages import HEAD_SUBJECT
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import InvalidArgument, Unavailable
from hive_common.ops.config import ServiceConfig, read_secret
from hive_common.ops.lifecycle import Stop
from hive_common.ops.migrate import migrate
from hive_common.ops.telemetry import Health, OpsServer
from hive_common.rpc.server import RpcServer, key_check
from hive_proto.audit.v1 import audit_pb2_grpc
from nats.aio.client import Client
from nats.aio.msg import Msg

from hive_audit.follower import Follower, connect_state
from hive_audit.log_source import LogSource
from hive_audit.relay import Relay, RelaySettings
from hive_audit.service import AuditService

START_TIMEOUT_S: Final = 30.0
RETRY_S: Final = 0.25
SWITCH_INTERVAL_S: Final = 0.001
"""Verification runs in threads and holds the interpreter; its default of 5 ms would show in every answer."""

T = TypeVar("T")


async def main(config: ServiceConfig, stop: Stop) -> None:
    """Run the audit service until `stop` is set.

    Raises:
        Unavailable: Postgres or NATS cannot be reached within half a minute.
        InvalidArgument: the configuration does not fit.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    settings = _relay_settings(config)
    health = Health()
    async with contextlib.AsyncExitStack() as stack:
        ops = OpsServer(health, config.ops_host, config.ops_port)
        await ops.start()
        stack.push_async_callback(ops.stop)
        starting = {"starting": "waits for Postgres and NATS"}
        health.add("start", lambda: starting.get("starting"))
        if not await _until(stop, _start(config, settings, stop, health, stack)):
            return
        starting.clear()
        await stop.wait()


async def _until(stop: Stop, work: Awaitable[None]) -> bool:
    """Await `work`, unless the end is asked for first. Says whether it was done."""
    started = asyncio.ensure_future(work)
    stopped = asyncio.ensure_future(stop.wait())
    await asyncio.wait((started, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not started.done():
        started.cancel()
        await asyncio.gather(started, return_exceptions=True)
        return False
    await started
    return True


async def _start(
    config: ServiceConfig,
    settings: RelaySettings,
    stop: Stop,
    health: Health,
    stack: contextlib.AsyncExitStack,
) -> None:
    dsn = config.postgres.dsn()
    await _eventually(lambda: _migrate(dsn))
    log_grew, relay_wake = asyncio.Event(), asyncio.Event()

    async def back() -> None:
        relay_wake.set()

    async with asyncio.timeout(START_TIMEOUT_S):
        client = await connect(config.nats, config.service, on_reconnect=back)
    stack.push_async_callback(client.close)
    await _wake_on_head(client, log_grew, relay_wake)

    async def open_source() -> LogSource:
        return await LogSource.open(dsn)

    follower = Follower(open_source, lambda: connect_state(dsn), log_grew)
    relay = Relay(open_source, client, settings, relay_wake)
    health.add("log", lambda: follower.problem)
    health.add("relay", lambda: relay.problem)
    health.add("nats", lambda: None if client.is_connected else "NATS is not connected")
    for name, work in (("follower", follower.run()), ("relay", relay.run())):
        task = asyncio.create_task(work, name=name)
        stop.guard(task)
        stack.push_async_callback(_cancel, task)

    rpc = RpcServer(config.grpc_host, config.grpc_port, key_check(read_secret(config.service_key_file)))
    store = await asyncio.to_thread(FolderStore, config.artifacts_dir)
    audit_pb2_grpc.add_AuditServicer_to_server(AuditService(open_source, SystemClock(), store), rpc.server)
    await rpc.start()
    stack.push_async_callback(rpc.stop)


def _relay_settings(config: ServiceConfig) -> RelaySettings:
    try:
        return msgspec.json.decode(config.extra.get("relay", msgspec.Raw(b"{}")), type=RelaySettings)
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"extra.relay: {error}", path="extra.relay") from error


async def _migrate(dsn: str) -> None:
    async with await connect_state(dsn) as conn:
        await migrate(conn, files("hive_audit") / "migrations", "audit")


async def _eventually(attempt: Callable[[], Awaitable[T]]) -> T:
    until = asyncio.get_running_loop().time() + START_TIMEOUT_S
    while True:
        try:
            return await attempt()
        except Unavailable:
            if asyncio.get_running_loop().time() > until:
                raise
            await asyncio.sleep(RETRY_S)


async def _wake_on_head(client: Client, *events: asyncio.Event) -> None:
    async def hint(message: Msg) -> None:
        for event in events:
            event.set()

    await client.subscribe(HEAD_SUBJECT, cb=hint)


async def _cancel(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
