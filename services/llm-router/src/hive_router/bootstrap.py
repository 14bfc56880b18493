"""Builds the router from its configuration, runs it, and takes it apart again."""

import asyncio
import contextlib
from collections.abc import Coroutine
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

from hive_router.admission import Admission
from hive_router.devices import Devices
from hive_router.executor_calls import ExecutorCalls
from hive_router.explanations import Explanations
from hive_router.fleet import Fleet
from hive_router.host import Host
from hive_router.metrics import observe_fleet
from hive_router.models import ModelsServicer
from hive_router.pool import Pool
from hive_router.recorder import Recorder
from hive_router.reports import Reports, report_refused
from hive_router.settings import settings_of
from hive_router.views import SCHEMA, FleetProjection, Views
from hive_router.waterfall import Waterfall


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
        await database.open(files("hive_router") / "migrations")
        health.add("postgres", database.problem)
        background(database.watch(), "database watch")

        fleet = Fleet()
        admission = Admission(fleet, settings, clock)
        observe_fleet(fleet)
        host = Host(settings, fleet, config.owner, admission.look_again)
        stack.push_async_callback(host.close)
        await host.open()
        background(host.run(), "models of the host")

        pool = Pool(settings)
        client = await eventually(
            lambda: connect(config.nats, config.service, on_reconnect=pool.reconnected), "NATS"
        )
        # Draining would wait for a server that may be gone; what is pending is asked again.
        stack.push_async_callback(client.close)
        health.add("nats", lambda: None if client.is_connected else "not connected")
        await pool.open(client)
        background(pool.run(), "devices that listen")
        wake = asyncio.Event()
        await wake_on_head(client, wake, types=FleetProjection.types)

        devices = Devices(
            Views(database, config.ns),
            fleet,
            settings,
            config.peers.get("scheduler"),
            key,
            changed=admission.look_again,
        )
        stack.push_async_callback(devices.close)
        reader = await stack.enter_async_context(LogReader(dsn))
        runner = ProjectionRunner(dsn, reader, FleetProjection(devices.moved), SCHEMA, wake=wake)
        observe_projection(runner, FleetProjection.name, health)
        background(runner.run(), "projection")
        await devices.load()
        await devices.ask()
        background(devices.run(runner), "devices")
        background(devices.watch(), "presence")

        writer = await eventually(lambda: LogWriter.open(dsn, on_head=head_announcer(client, wake)), "the log")
        stack.push_async_callback(writer.close)
        observe_writer(writer)
        store = await asyncio.to_thread(FolderStore, config.artifacts_dir)
        recorder = Recorder(writer, store, settings, config.ns)
        recording = asyncio.create_task(recorder.run(), name="records")
        stop.guard(recording)
        stack.push_async_callback(recorder.close, recording)
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
        explained = await stack.enter_async_context(LogReader(dsn))
        explanations = Explanations(recorder, explained, config.ns)

        executor_calls = ExecutorCalls(client, waterfall, recorder, devices, settings)
        stack.push_async_callback(executor_calls.close)
        devices.on_gone += [pool.gone, executor_calls.gone]
        await executor_calls.open()
        reports = Reports(writer, explained, recorder, devices, clock, config.ns)
        await respond(client, call_subject("*", "model-done"), ModelCallReport, reports.report, report_refused)

        server = RpcServer(config.grpc_host, config.grpc_port, key_check(key))
        servicer = ModelsServicer(waterfall, explanations, config.owner)
        models_pb2_grpc.add_ModelsServicer_to_server(servicer, server.server)
        stack.push_async_callback(server.stop)
        await server.start()
        started.set()
        await stop.wait()


async def _ended(task: asyncio.Task[None]) -> None:
    task.cancel()
    # Its failure has been told by the guard.
    await asyncio.wait([task])
