"""Builds the registry from its configuration, runs it, and takes it apart again."""

import asyncio
import contextlib
from collections.abc import Coroutine
from importlib.resources import files
from typing import Any

from hive_common.artifacts.store import FolderStore
from hive_common.bus.heads import head_announcer, wake_on_head
from hive_common.bus.nats import connect, respond
from hive_common.contracts.messages import HelloRequest, hello_subject
from hive_common.eventlog.log import LogReader, LogWriter
from hive_common.eventlog.observed import observe_projection, observe_writer
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.kernel.clock import SystemClock
from hive_common.ops.config import ServiceConfig, read_secret
from hive_common.ops.database import Database
from hive_common.ops.lifecycle import Stop
from hive_common.ops.startup import eventually
from hive_common.ops.telemetry import Health, OpsServer
from hive_common.rpc.server import RpcServer, key_check
from hive_proto.agents.v1 import agents_pb2_grpc
from hive_proto.executors.v1 import executors_pb2_grpc
from nats.aio.client import Client

from hive_registry.agents import AgentsServicer
from hive_registry.executors import ExecutorDesk, ExecutorsServicer, hello_refused
from hive_registry.log_access import LogAccess
from hive_registry.presence import SchedulerPresence
from hive_registry.settings import settings_of
from hive_registry.views import SCHEMA, RegistryProjection, Views


async def main(config: ServiceConfig, stop: Stop) -> None:
    """Serve until `stop` is set.

    Raises:
        InvalidArgument: the configuration.
        Unavailable: Postgres or NATS did not come in time.
    """
    settings = settings_of(config)
    key = read_secret(config.service_key_file)
    clock = SystemClock()
    health = Health()
    started = asyncio.Event()
    health.add("start", lambda: None if started.is_set() else "starting")
    async with contextlib.AsyncExitStack() as stack:
        ops = OpsServer(health, config.ops_host, config.ops_port)
        stack.push_async_callback(ops.stop)
        await ops.start()

        def background(work: Coroutine[Any, Any, None], name: str) -> None:
            task = asyncio.create_task(work, name=name)
            stop.guard(task)
            stack.push_async_callback(_ended, task)

        dsn = config.postgres.dsn()
        database = Database(dsn, SCHEMA)
        stack.push_async_callback(database.close)
        await database.open(files("hive_registry") / "migrations")
        health.add("postgres", database.problem)
        background(database.watch(), "database watch")

        client = await _connected(config, health, stack)
        wake = asyncio.Event()
        await wake_on_head(client, wake, types=RegistryProjection.types)

        reader = await stack.enter_async_context(LogReader(dsn))
        runner = ProjectionRunner(dsn, reader, RegistryProjection(), SCHEMA, wake=wake)
        observe_projection(runner, RegistryProjection.name, health)
        background(runner.run(), "projection")
        writer = await eventually(lambda: LogWriter.open(dsn, on_head=head_announcer(client, wake)), "the log")
        stack.push_async_callback(writer.close)
        observe_writer(writer)

        heads = await stack.enter_async_context(LogReader(dsn))
        log = LogAccess(writer, heads, runner, wake, clock, config.owner, config.ns)
        views = Views(database, config.ns)
        desk = ExecutorDesk(views, log, clock, settings.blobs_url)
        presence = SchedulerPresence(config.peers.get("scheduler"), key)
        stack.push_async_callback(presence.close)

        server = RpcServer(config.grpc_host, config.grpc_port, key_check(key))
        executors_pb2_grpc.add_ExecutorsServicer_to_server(ExecutorsServicer(views, desk, presence), server.server)
        store = await asyncio.to_thread(FolderStore, config.artifacts_dir)
        agents_pb2_grpc.add_AgentsServicer_to_server(AgentsServicer(views, log, store), server.server)
        await server.start()
        stack.push_async_callback(server.stop)
        await respond(client, hello_subject("*"), HelloRequest, desk.hello, hello_refused)
        started.set()
        await stop.wait()


async def _connected(config: ServiceConfig, health: Health, stack: contextlib.AsyncExitStack) -> Client:
    client = await eventually(lambda: connect(config.nats, config.service), "NATS")
    # Draining would wait for a server that may be gone; what is pending is asked again.
    stack.push_async_callback(client.close)
    health.add("nats", lambda: None if client.is_connected else "not connected")
    return client


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    # Its failure has been told by the guard.
    await asyncio.wait([task])
