"""Builds the router from its configuration, runs it, and takes it apart again."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from importlib.resources import files
from typing import Any, Final

from hive_common.artifacts.store import FolderStore
from hive_common.bus.heads import head_announcer, wake_on_head
from hive_common.bus.nats import connect, respond
from hive_common.contracts.messages import ModelCallReport, call_subject
from hive_common.control.kill_log import TYPES as KILL_TYPES
from hive_common.control.kill_log import KillLog
from hive_common.eventlog.log import LogReader, LogWriter
from hive_common.eventlog.observed import observe_projection, observe_writer
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import Unavailable
from hive_common.ops.config import ServiceConfig, read_secret
from hive_common.ops.database import Database
from hive_common.ops.lifecycle import Stop
from hive_common.ops.startup import eventually
from hive_common.ops.telemetry import Health, OpsServer
from hive_common.rpc.server import RpcServer, key_check
from hive_proto.models.v1 import models_pb2_grpc
from nats.aio.client import Client

from hive_router.admission import Admission
from hive_router.cloud import Cloud
from hive_router.devices import Devices
from hive_router.exchange import Exchange
from hive_router.executor_calls import ExecutorCalls
from hive_router.explanations import Explanations
from hive_router.fleet import Fleet
from hive_router.host import Host
from hive_router.jobs import Jobs
from hive_router.kills import refused
from hive_router.ledger import Ledger, MoneyProjection, UsageProjection
from hive_router.metrics import observe_fleet
from hive_router.models import ModelsServicer
from hive_router.pool import Pool
from hive_router.providers import Providers
from hive_router.recorder import Recorder
from hive_router.reports import Reports, report_refused
from hive_router.response_cache import ResponseCache
from hive_router.settings import RouterSettings, settings_of
from hive_router.spending import Spending
from hive_router.tokens import CapabilityTokens
from hive_router.treasury import Treasury
from hive_router.views import SCHEMA, FleetProjection, Views
from hive_router.waterfall import Outside, Waterfall

USAGE_POLL_S: Final = 2.0
"""Sums of what calls used are brought up to date so often; whoever asks for them has that done at once."""

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
        database = await process.database()
        views = Views(database, config.ns)

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

        money_wake, usage_wake = asyncio.Event(), asyncio.Event()
        await wake_on_head(client, money_wake, types=MoneyProjection.types)
        # Records of calls are nothing that the fleet is made of.
        writer, recorder = await process.records(head_announcer(client))
        reader = await stack.enter_async_context(LogReader(config.postgres.dsn()))
        ledger = await process.ledger(database, reader, money_wake, usage_wake)
        treasury = Treasury(writer, ledger.account, clock, owner=config.owner, ns=config.ns)
        stack.push_async_callback(treasury.close)
        process.background(treasury.run(), "budgets that nobody calls for")
        try:
            treasury.know(await ledger.limits())
        except Unavailable:
            if not ledger.has_failed:
                raise
            # Whoever guards its projections says why, and stops this process.
            await stop.wait()
            return
        cache = ResponseCache(settings.cache) if settings.cache is not None else None
        if cache is not None:
            stack.push_async_callback(cache.close)
        outside = await process.outside(fleet, treasury, ledger, reader)

        def obey() -> None:
            admission.killed = kills.verifier.stopped.executors
            for executor in admission.killed:
                pool.gone(executor)
            waterfall.stop_refused()

        kills = await process.kills(client, obey)
        waterfall = Waterfall(
            fleet,
            admission,
            host=host.complete,
            pool=pool.complete,
            host_executors=frozenset(settings.host_executors),
            begun=recorder.begun,
            finished=recorder.finished,
            missing=host.look_for_missing,
            outside=outside,
            refused=partial(refused, kills),
            cache=cache,
            treasury=treasury,
        )
        obey()
        tokens = CapabilityTokens(config.token_public_key, clock, kills)
        executor_calls = ExecutorCalls(client, waterfall, recorder, devices, settings, tokens)
        stack.push_async_callback(executor_calls.close)
        devices.on_gone += [pool.gone, executor_calls.gone]
        await executor_calls.open()
        reports = Reports(writer, reader, recorder, devices, clock, config.ns, tokens)
        await respond(client, call_subject("*", "model-done"), ModelCallReport, reports.report, report_refused)

        server = RpcServer(config.grpc_host, config.grpc_port, key_check(key))
        explanations = Explanations(recorder, reader, config.ns)
        servicer = ModelsServicer(
            waterfall, explanations, Spending(treasury, ledger, Jobs(reader, config.ns)), config.owner
        )
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

    async def database(self) -> Database:
        """Open the database."""
        database = Database(self._dsn, SCHEMA)
        self._stack.push_async_callback(database.close)
        await database.open(files("hive_router") / "migrations")
        self._health.add("postgres", database.problem)
        self.background(database.watch(), "database watch")
        return database

    async def ledger(
        self, database: Database, head: LogReader, money_wake: asyncio.Event, usage_wake: asyncio.Event
    ) -> Ledger:
        """Follow the log for keys, budgets and usage."""
        runners = []
        for projection, wake in ((MoneyProjection(), money_wake), (UsageProjection(), usage_wake)):
            reader = await self._stack.enter_async_context(LogReader(self._dsn))
            runner = ProjectionRunner(self._dsn, reader, projection, SCHEMA, wake=wake, poll_s=USAGE_POLL_S)
            observe_projection(runner, projection.name, self._health)
            self.background(runner.run(), f"projection of {projection.name}")
            runners.append(runner)

        def look() -> None:
            money_wake.set()
            usage_wake.set()

        now_us = SystemClock().now_us
        return Ledger(database, head, runners[0], runners[1], look, self._config.ns, now_us)

    async def outside(self, fleet: Fleet, treasury: Treasury, ledger: Ledger, reader: LogReader) -> Outside | None:
        """Return the way to providers, where there are any."""
        settings, config = self._settings, self._config
        if not settings.providers:
            return None
        providers = Providers(settings.providers, settings.in_flight_max)
        self._stack.push_async_callback(providers.close)
        await providers.open(fleet)
        cloud = Cloud(
            treasury,
            ledger,
            reader,
            owner=config.owner,
            ns=config.ns,
            owner_key=settings.owner_key,
            owner_cloud=settings.owner_cloud,
        )
        return Outside(fleet, providers, cloud, treasury)

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

    async def kills(self, client: Client, on_order: Callable[[], None]) -> KillLog:
        """Follow the kill orders of the log."""
        reader = await self._stack.enter_async_context(LogReader(self._dsn))
        kills = KillLog(reader, self._config.ns, self._config.kill_public_key)
        await eventually(kills.catch_up, "kill orders in the log")
        kills.on_order = lambda _: on_order()
        await wake_on_head(client, kills.wake, types=KILL_TYPES)
        self.background(kills.follow(), "kill orders")
        return kills

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
