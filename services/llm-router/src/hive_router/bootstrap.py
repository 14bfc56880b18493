"""Builds the router from its configuration, runs it, and takes it apart again."""

import asyncio
import contextlib
from collections.abc import Coroutine
from importlib.resources import files
from typing import Any

from hive_common.bus.heads import wake_on_head
from hive_common.bus.nats import connect
from hive_common.eventlog.log import LogReader
from hive_common.eventlog.observed import observe_projection
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import ServiceConfig, read_secret
from hive_common.ops.database import Database
from hive_common.ops.lifecycle import Stop
from hive_common.ops.startup import eventually
from hive_common.ops.telemetry import Health, OpsServer
from hive_common.rpc.server import RpcServer, key_check
from hive_proto.models.v1 import models_pb2_grpc

from hive_router.models import ModelsServicer
from hive_router.views import SCHEMA, ModelsProjection, Views


async def main(config: ServiceConfig, stop: Stop) -> None:
    """Serve until `stop` is set.

    Raises:
        InvalidArgument: the configuration.
        Unavailable: Postgres or NATS did not come in time.
    """
    if config.extra:
        raise InvalidArgument(
            f"configuration of the router, extra: unknown field `{min(config.extra)}`", path="extra"
        )
    key = read_secret(config.service_key_file)
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
        await database.open(files("hive_router") / "migrations")
        health.add("postgres", database.problem)
        background(database.watch(), "database watch")

        client = await eventually(lambda: connect(config.nats, config.service), "NATS")
        # Draining would wait for a server that may be gone; what is pending is asked again.
        stack.push_async_callback(client.close)
        health.add("nats", lambda: None if client.is_connected else "not connected")
        wake = asyncio.Event()
        await wake_on_head(client, wake, types=ModelsProjection.types)

        reader = await stack.enter_async_context(LogReader(dsn))
        runner = ProjectionRunner(dsn, reader, ModelsProjection(), SCHEMA, wake=wake)
        observe_projection(runner, ModelsProjection.name, health)
        background(runner.run(), "projection")

        server = RpcServer(config.grpc_host, config.grpc_port, key_check(key))
        models_pb2_grpc.add_ModelsServicer_to_server(ModelsServicer(Views(database, config.ns)), server.server)
        stack.push_async_callback(server.stop)
        await server.start()
        started.set()
        await stop.wait()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    # Its failure has been told by the guard.
    await asyncio.wait([task])
