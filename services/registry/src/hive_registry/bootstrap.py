"""Builds the registry from its configuration, runs it, and takes it apart again."""

import asyncio
import contextlib
from collections.abc import Callable, Coroutine
from importlib.resources import files
from typing import Any, Final

import msgspec
from hive_common.artifacts.store import FolderStore
from hive_common.bus.heads import head_announcer, wake_on_head
from hive_common.bus.nats import connect, respond
from hive_common.contracts.messages import HelloRequest, KvRequest, call_subject, hello_subject
from hive_common.control.kill_log import TYPES as KILL_TYPES
from hive_common.control.kill_log import KillLog
from hive_common.eventlog.log import LogReader, LogWriter
from hive_common.eventlog.observed import observe_projection, observe_writer
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.kernel.clock import Clock, SystemClock
from hive_common.ops.config import ServiceConfig, read_secret
from hive_common.ops.database import Database
from hive_common.ops.lifecycle import Stop
from hive_common.ops.startup import eventually
from hive_common.ops.telemetry import Health, OpsServer
from hive_common.permissions.tokens import Verifier
from hive_common.rpc.server import RpcServer, key_check
from hive_proto.agents.v1 import agents_pb2_grpc
from hive_proto.control.v1 import control_pb2_grpc
from hive_proto.executors.v1 import executors_pb2_grpc
from hive_proto.keys.v1 import keys_pb2_grpc
from hive_proto.values.v1 import values_pb2_grpc
from nats.aio.client import Client

from hive_registry.agents import AgentsServicer
from hive_registry.desk import ExecutorDesk, hello_refused
from hive_registry.enrolment import EnrolmentDesk, Identities
from hive_registry.executors import ExecutorsServicer
from hive_registry.grant_views import GrantViews
from hive_registry.grants import GrantDesk
from hive_registry.identities import Revocations, Signer
from hive_registry.key_views import KeyViews
from hive_registry.keys import KeysServicer
from hive_registry.kills import ControlServicer, KillDesk
from hive_registry.kv import KvDesk, ValuesServicer, kv_refused
from hive_registry.kv_source import KvSource
from hive_registry.kv_views import KvProjection, KvViews
from hive_registry.log_access import LogAccess
from hive_registry.presence import SchedulerPresence
from hive_registry.settings import IdentitySettings, RegistrySettings, settings_of
from hive_registry.signers import SignerDesk
from hive_registry.views import SCHEMA, RegistryProjection, Views

SYSTEM_IDENTITY: Final = "registry-system"
KV_POLL_S: Final = 5.0


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
        kill_reader = await stack.enter_async_context(LogReader(dsn))
        kills = KillLog(kill_reader, config.ns, config.kill_public_key)
        await wake_on_head(client, kills.wake, types=KILL_TYPES)
        await eventually(kills.catch_up, "kill orders in the log")
        background(kills.follow(), "kill orders")
        kill_desk = KillDesk(kills, views, log, client)
        signers = SignerDesk(views, log)
        desk = ExecutorDesk(views, log, clock, settings.blobs_url, kills, signers)
        identities = _identities(settings, views, clock)
        enrolment = EnrolmentDesk(
            views,
            log,
            desk,
            clock,
            owner=config.owner,
            nats_url=settings.nats_url or config.nats.url,
            blobs_url=settings.blobs_url,
            identities=identities,
            kill_public_key=config.kill_public_key,
            token_public_key=config.token_public_key,
        )
        presence = SchedulerPresence(config.peers.get("scheduler"), key)
        stack.push_async_callback(presence.close)

        server = RpcServer(config.grpc_host, config.grpc_port, key_check(key))
        executors = ExecutorsServicer(views, desk, enrolment, presence, kills)
        executors_pb2_grpc.add_ExecutorsServicer_to_server(executors, server.server)
        control_pb2_grpc.add_ControlServicer_to_server(ControlServicer(kill_desk, views), server.server)
        keys_pb2_grpc.add_KeysServicer_to_server(KeysServicer(KeyViews(database, config.ns), log), server.server)
        store = await asyncio.to_thread(FolderStore, config.artifacts_dir)
        grants = GrantDesk(views, GrantViews(database, config.ns), log, clock)
        agents_pb2_grpc.add_AgentsServicer_to_server(
            AgentsServicer(views, log, store, signers, grants, kill_desk.check_agent, presence), server.server
        )
        await enrolment.enrol_locals(settings.local_executors)
        await signers.trust_own(settings.author_keys)
        if identities is not None and settings.identities is not None:
            system = await _system(config, settings.identities, identities, stack)
            background(identities.revocations.run(system), "revocations")
        values = await _kept_values(config, client, writer, database, clock, health, background, stack)
        values_pb2_grpc.add_ValuesServicer_to_server(ValuesServicer(values), server.server)
        await server.start()
        stack.push_async_callback(server.stop)
        await respond(client, hello_subject("*"), HelloRequest, desk.hello, hello_refused)
        await respond(client, call_subject("*", "kv"), KvRequest, values.call, kv_refused)
        started.set()
        await stop.wait()


async def _kept_values(
    config: ServiceConfig,
    client: Client,
    writer: LogWriter,
    database: Database,
    clock: Clock,
    health: Health,
    background: Callable[[Coroutine[Any, Any, None], str], None],
    stack: contextlib.AsyncExitStack,
) -> KvDesk:
    """A projection of its own: it also reads how tasks end, and is in no hurry unless somebody asks."""
    dsn = config.postgres.dsn()
    wake = asyncio.Event()
    await wake_on_head(client, wake, types=("KvStaged",))
    reader = await stack.enter_async_context(LogReader(dsn))
    views = KvViews(database, config.ns)
    source = KvSource(reader, views.staged)
    runner = ProjectionRunner(dsn, source, KvProjection(), SCHEMA, wake=wake, poll_s=KV_POLL_S)
    observe_projection(runner, KvProjection.name, health)
    background(runner.run(), "projection of kept values")
    ends = await stack.enter_async_context(LogReader(dsn))
    log = LogAccess(writer, ends, runner, wake, clock, config.owner, config.ns)
    verifier = Verifier(config.token_public_key) if config.token_public_key else None
    return KvDesk(views, log, ends, verifier, clock, config.owner, config.ns)


def _identities(settings: RegistrySettings, views: Views, clock: Clock) -> Identities | None:
    if settings.identities is None:
        return None
    signer = Signer(settings.identities, clock)
    return Identities(signer, Revocations(signer, views.revoked_keys))


async def _system(
    config: ServiceConfig, settings: IdentitySettings, identities: Identities, stack: contextlib.AsyncExitStack
) -> Client:
    nats = msgspec.structs.replace(config.nats, credentials_file=settings.system_credentials_file)
    revocations = identities.revocations
    client = await eventually(
        lambda: connect(nats, SYSTEM_IDENTITY, on_reconnect=revocations.reconnected), "NATS, for its accounts"
    )
    stack.push_async_callback(client.close)
    return client


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
