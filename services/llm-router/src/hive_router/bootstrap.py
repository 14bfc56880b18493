"""Builds the router from its configuration, runs it, and takes it apart again."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from importlib.resources import files
from typing import Any

from hive_common.artifacts.store import FolderStore
from hive_common.bus.heads import head_announcer, wake_on_head
from hive_common.bus.nats import connect, respond
from hive_common.contracts.messages import ModelCallReport, call_subject
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
from hive_proto.models.v1 import models_pb2_grpc
from nats.aio.client import Client

from hive_router.admission import Admission
from hive_router.devices import Devices
from hive_router.exchange import Exchange
from hive_router.executor_calls import ExecutorCalls
from hive_router.explanations import Explanations
from hive_router.fleet import Fleet
from hive_router.host import Host
from hive_router.metrics import observe_fleet
from hive_router.models import ModelsServicer
from hive_router.pool import Pool
from hive_router.recorder import Recorder
from hive_router.reports import Reports, report_refused
from hive_router.settings import RouterSettings, settings_of
from hive_router.views import SCHEMA, FleetProjection, Views
from hive_router.waterfall import Waterfall

OnHead = Callable[[int, tuple[str, ...]], Awaitable[None]]


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
        process = _Process(config, settings, stop, health, stack)
        ops = OpsServer(health, config.ops_host, config.ops_port)
        stack.push_async_callback(ops.stop)
        await ops.start()
        views = await process.views()

        fleet = Fleet()
        observe_fleet(fleet)
        admission = Admission(fleet, settings, clock)
        host = Host(settings, fleet, config.owner, admission.look_again)
        stack.push_async_callback(host.close)
        await host.open()
        process.background(host.run(), "models of the host")

        pool = Pool(settings)
        client = await process.nats(pool)
        wake = asyncio.Event()
        await wake_on_head(client, wake, types=FleetProjection.types)
        devices = Devices(views, fleet, settings, config.peers.get("scheduler"), key, changed=admission.look_again)
        await process.follow(devices, wake)

        # Records of calls are nothing that the fleet is made of.
        writer, recorder = await process.records(head_announcer(client))
        waterfall = Waterfall(
            fleet,
            admission,
            host=host.complete,
            pool=pool.complete,
            host_executors=frozenset(settings.host_executors),
            begun=recorder.begun,
            finished=recorder.finished,
            missing=host.look_for_missing,
        )
        executor_calls = ExecutorCalls(client, waterfall, recorder, devices, settings)
        stack.push_async_callback(executor_calls.close)
        devices.on_gone += [pool.gone, executor_calls.gone]
        await executor_calls.open()
        reader = await stack.enter_async_context(LogReader(config.postgres.dsn()))
        reports = Reports(writer, reader, recorder, devices, clock, config.ns)
        await respond(client, call_subject("*", "model-done"), ModelCallReport, reports.report, report_refused)

        server = RpcServer(config.grpc_host, config.grpc_port, key_check(key))
        servicer = ModelsServicer(waterfall, Explanations(recorder, reader, config.ns), config.owner)
        models_pb2_grpc.add_ModelsServicer_to_server(servicer, server.server)
        exchange = Exchange(servicer, config.grpc_host)
        models_pb2_grpc.add_ExchangeServicer_to_server(exchange, server.server)
        stack.push_async_callback(exchange.stop)
        await exchange.start()
        stack.push_async_callback(server.stop)
        await server.start()
        started.set()
        await stop.wait()


class _Process:
    """What the parts of this process are built with."""

    def __init__(
        self,
        config: ServiceConfig,
        settings: RouterSettings,
        stop: Stop,
        health: Health,
        stack: contextlib.AsyncExitStack,
    ) -> None:
        self._config = config
        self._settings = settings
        self._stop = stop
        self._health = health
        self._stack = stack
        self._dsn = config.postgres.dsn()

    def background(self, work: Coroutine[Any, Any, None], name: str) -> None:
        """Run something until the end; the process ends where it fails."""
        task = asyncio.create_task(work, name=name)
        self._stop.guard(task)
        self._stack.push_async_callback(_ended, task)

    async def views(self) -> Views:
        """Open the database."""
        database = Database(self._dsn, SCHEMA)
        self._stack.push_async_callback(database.close)
        await database.open(files("hive_router") / "migrations")
        self._health.add("postgres", database.problem)
        self.background(database.watch(), "database watch")
        return Views(database, self._config.ns)

    async def nats(self, pool: Pool) -> Client:
        """Connect, and let the pool listen."""
        client = await eventually(
            lambda: connect(self._config.nats, self._config.service, on_reconnect=pool.reconnected), "NATS"
        )
        # Draining would wait for a server that may be gone; what is pending is asked again.
        self._stack.push_async_callback(client.close)
        self._health.add("nats", lambda: None if client.is_connected else "not connected")
        await pool.open(client)
        self.background(pool.run(), "devices that listen")
        return client

    async def follow(self, devices: Devices, wake: asyncio.Event) -> None:
        """Follow the log, and the scheduler, for who is in the pool."""
        self._stack.push_async_callback(devices.close)
        reader = await self._stack.enter_async_context(LogReader(self._dsn))
        runner = ProjectionRunner(self._dsn, reader, FleetProjection(devices.moved), SCHEMA, wake=wake)
        observe_projection(runner, FleetProjection.name, self._health)
        self.background(runner.run(), "projection")
        await devices.load()
        await devices.ask()
        self.background(devices.run(runner), "devices")
        self.background(devices.watch(), "presence")

    async def records(self, on_head: OnHead) -> tuple[LogWriter, Recorder]:
        """Open the log for what has ended."""
        writer = await eventually(lambda: LogWriter.open(self._dsn, on_head=on_head), "the log")
        self._stack.push_async_callback(writer.close)
        observe_writer(writer)
        store = await asyncio.to_thread(FolderStore, self._config.artifacts_dir)
        recorder = Recorder(writer, store, self._settings, self._config.ns)
        recording = asyncio.create_task(recorder.run(), name="records")
        self._stop.guard(recording)
        self._stack.push_async_callback(recorder.close, recording)
        return writer, recorder


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    # Its failure has been told by the guard.
    await asyncio.wait([task])
