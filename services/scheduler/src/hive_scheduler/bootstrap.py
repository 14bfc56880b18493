"""The scheduler process: stands by until it leads, leads until it is stopped or loses the lock."""

import asyncio
import logging
from typing import Final

import msgspec
from hive_common.artifacts.store import FolderStore
from hive_common.bus import nats as bus
from hive_common.contracts.limits import APPROVAL_MS, LEASE_MS
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import ServiceConfig, read_secret
from hive_common.ops.lifecycle import Stop
from hive_common.ops.startup import eventually
from hive_common.ops.telemetry import Health, OpsServer
from hive_common.permissions.tokens import Minter, Verifier, public_key
from hive_common.rpc.server import RpcServer, key_check
from hive_proto.approvals.v1 import approvals_pb2_grpc
from hive_proto.canaries.v1 import canaries_pb2_grpc
from hive_proto.executors.v1 import executors_pb2_grpc
from hive_proto.jobs.v1 import jobs_pb2_grpc
from hive_proto.pain.v1 import pain_pb2_grpc
from nats.aio.client import Client

from hive_scheduler import metrics
from hive_scheduler.approvals_rpc import ApprovalsService
from hive_scheduler.canaries_rpc import CanariesService
from hive_scheduler.database import PostgresDatabase, prepare_database
from hive_scheduler.failure_groups import Failures
from hive_scheduler.leader import Leader
from hive_scheduler.leadership import lead
from hive_scheduler.pain_rpc import PainService
from hive_scheduler.rpc import IntakeService, JobsService, PresenceService

log = logging.getLogger(__name__)

LEASE_MIN_MS: Final = 1_000
APPROVAL_MIN_MS: Final = 1_000
RPC_GRACE_S: Final = 1.0
LAG_MAX: Final = 10_000
"""A view that is further behind than this makes the service not ready."""


class Settings(msgspec.Struct, frozen=True):
    """What `config.extra` may say to the scheduler. `lease_ms` is at least a second.

    `token_key_file` (mode 0600) holds the root key of capability tokens; without it agents that ask for permissions
    cannot be used. `approval_ms` is how long people may take to decide what attempts ask, a second at least.
    """

    lease_ms: int = LEASE_MS
    token_key_file: str = ""
    approval_ms: int = APPROVAL_MS

    @classmethod
    def of(cls, config: ServiceConfig) -> "Settings":
        """Decode the settings. Raises `InvalidArgument`."""
        known = {field.name for field in msgspec.structs.fields(cls)}
        if unknown := config.extra.keys() - known:
            raise InvalidArgument(f"extra: unknown settings {', '.join(sorted(unknown))}", path="extra")
        try:
            settings = msgspec.json.decode(msgspec.json.encode(config.extra), type=cls)
        except msgspec.ValidationError as error:
            raise InvalidArgument(f"extra: {error}", path="extra") from error
        if settings.lease_ms < LEASE_MIN_MS:
            raise InvalidArgument(f"extra.lease_ms: expected {LEASE_MIN_MS} at least", path="extra.lease_ms")
        if settings.approval_ms < APPROVAL_MIN_MS:
            raise InvalidArgument(
                f"extra.approval_ms: expected {APPROVAL_MIN_MS} at least", path="extra.approval_ms"
            )
        return settings


class _State:
    """What the readiness checks and NATS callbacks look at."""

    def __init__(self) -> None:
        self.leader: Leader | None = None
        self.standing_by = False
        self.client: Client | None = None

    def leads(self) -> str | None:
        """Check: this process leads."""
        if self.leader is not None:
            return None
        return "stands by: another scheduler leads" if self.standing_by else "starting"

    def nats(self) -> str | None:
        """Check: NATS is there."""
        return None if self.client is not None and self.client.is_connected else "not connected to NATS"

    def views(self) -> str | None:
        """Check: the views follow the log."""
        if self.leader is None or self.leader.views.lag <= LAG_MAX:
            return None
        return f"the views are {self.leader.views.lag} positions behind the log"

    async def disconnected(self) -> None:
        """NATS is gone."""
        if self.leader is not None:
            self.leader.dispatcher.freeze()

    async def reconnected(self) -> None:
        """NATS is back."""
        if self.leader is not None:
            self.leader.dispatcher.thaw()

    def stand_by(self, standing_by: bool) -> None:
        """Note whether another scheduler leads."""
        self.standing_by = standing_by


async def main(config: ServiceConfig, stop: Stop) -> None:
    """Run the scheduler until `stop` is set."""
    state = _State()
    health = Health()
    health.add("leader", state.leads)
    health.add("nats", state.nats)
    health.add("views", state.views)
    metrics.LEADER.set(0)
    ops = OpsServer(health, config.ops_host, config.ops_port)
    await ops.start()
    try:
        # The lock is waited for as long as it takes, but a stop ends the waiting at once.
        serving = asyncio.create_task(_serve(config, stop, state), name="scheduler")
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if state.leader is None and not serving.done():
            serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        stopping.cancel()
        if not serving.cancelled():
            serving.result()
    finally:
        await ops.stop()


async def _serve(config: ServiceConfig, stop: Stop, state: _State) -> None:
    clock = SystemClock()
    settings = Settings.of(config)
    dsn = config.postgres.dsn()
    await eventually(lambda: prepare_database(dsn), "Postgres")
    store = FolderStore(config.artifacts_dir)
    state.client = client = await eventually(
        lambda: bus.connect(
            config.nats, "scheduler", on_disconnect=state.disconnected, on_reconnect=state.reconnected
        ),
        "NATS",
    )
    try:
        conn, epoch = await lead(dsn, clock, state.stand_by)
        database = PostgresDatabase(conn, dsn)
        token_key = read_secret(settings.token_key_file) if settings.token_key_file else None
        leader = Leader(
            *(database, epoch, client, store, config.ns, config.owner, clock, stop, settings.lease_ms),
            kill_public_key=config.kill_public_key,
            minter=Minter(token_key) if token_key else None,
            verifier=Verifier(public_key(token_key)) if token_key else None,
            approval_ms=settings.approval_ms,
        )
        rpc = RpcServer(config.grpc_host, config.grpc_port, key_check(read_secret(config.service_key_file)))
        jobs_pb2_grpc.add_JobsServicer_to_server(
            JobsService(
                leader.engine,
                leader.submissions,
                leader.queries,
                leader.views,
                leader.reader,
                leader.hub,
                leader.fleet,
                leader.catalogue,
                leader.views_wake,
            ),
            rpc.server,
        )
        jobs_pb2_grpc.add_IntakeServicer_to_server(IntakeService(leader.submissions), rpc.server)
        approvals_pb2_grpc.add_ApprovalsServicer_to_server(ApprovalsService(leader.approvals), rpc.server)
        canaries_pb2_grpc.add_CanariesServicer_to_server(CanariesService(leader.canaries), rpc.server)
        executors_pb2_grpc.add_PresenceServicer_to_server(
            PresenceService(leader.dispatcher, leader.catalogue, leader.reputation), rpc.server
        )
        failures = Failures(dsn, config.ns)
        following: asyncio.Task[None] | None = None
        pain_pb2_grpc.add_PainServicer_to_server(PainService(failures), rpc.server)
        try:
            await leader.start()
            state.leader = leader
            await failures.open()
            following = asyncio.create_task(failures.runner.run(), name="failures")
            stop.guard(following)
            await rpc.start()
            await stop.wait()
        finally:
            # One that does not lead any more can answer nobody, and its successor waits.
            await rpc.stop(0.0 if stop.exit_code else RPC_GRACE_S)
            if following is not None:
                following.cancel()
                await asyncio.gather(following, return_exceptions=True)
            await failures.close()
            await leader.close()
    finally:
        await client.close()
