"""The services behind the gateway: one channel to each, calls with key, caller and deadline, and their health."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import TypeVar

import grpc.aio
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from hive_common.kernel.errors import HiveError, Internal, Unauthenticated, Unavailable
from hive_common.rpc.client import bearer, open_channel
from hive_common.rpc.errors import TRAILER, raised
from hive_common.rpc.rules import KeyRules, metadata_of
from hive_proto.agents.v1 import agents_pb2_grpc
from hive_proto.approvals.v1 import approvals_pb2_grpc
from hive_proto.audit.v1 import audit_pb2_grpc
from hive_proto.canaries.v1 import canaries_pb2_grpc
from hive_proto.control.v1 import control_pb2_grpc
from hive_proto.executors.v1 import executors_pb2_grpc
from hive_proto.jobs.v1 import jobs_pb2_grpc
from hive_proto.keys.v1 import keys_pb2_grpc
from hive_proto.models.v1 import models_pb2_grpc
from hive_proto.pain.v1 import pain_pb2_grpc
from hive_proto.values.v1 import values_pb2_grpc
from prometheus_client import Gauge

from hive_gateway.keys import Caller

Q = TypeVar("Q")
R = TypeVar("R")

CALLER_METADATA = "hive-caller"
"""Metadata that tells a peer the pseudonym of who called the gateway."""

UNARY_S = 15.0
"""Deadline of a call that answers from a view, or commits one thing."""

SUBMIT_S = 30.0
VERIFY_S = 1_800.0
"""Verification reads the whole log."""

STREAM_S = 3_600.0
"""Deadline of a stream. One that follows a job is taken up again where it stopped."""

HEALTH_METHOD = "/grpc.health.v1.Health/Check"
HEALTH_EVERY_S = 2.0
HEALTH_AGAIN_S = 0.2
"""The same while one of them has a problem: this gateway is not ready until it has none."""
HEALTH_S = 1.0

_UP = Gauge("hive_gateway_peer_up", "1 while the peer's health check answers SERVING", ["peer"])


class Peer:
    """One service behind the gateway.

    Args:
        name: as in `config.peers`.
        address: `host:port` of its gRPC server.
        key: what services show each other.
    """

    def __init__(self, name: str, address: str, key: str) -> None:
        self.name = name
        self.host = address.rpartition(":")[0].strip("[]")
        self.channel = open_channel(address)
        self._key = key
        self._health: grpc.aio.UnaryUnaryMultiCallable[HealthCheckRequest, HealthCheckResponse]
        self._health = self.channel.unary_unary(
            HEALTH_METHOD, HealthCheckRequest.SerializeToString, HealthCheckResponse.FromString
        )
        self._problem: str | None = f"the {name} has not been asked yet"

    def metadata(self, caller: Caller | None) -> tuple[tuple[str, str | bytes], ...]:
        """Return what a call carries: the service key in place of the caller's, who that is, and its key's rules.

        A call for several callers names them in its message.
        """
        if caller is None:
            return bearer(self._key)
        only = "" if caller.scope == "admin" else caller.pseudonym
        rules = KeyRules(caller.pin, caller.counts_only, caller.cloud, caller.name, only)
        return (*bearer(self._key), (CALLER_METADATA, caller.pseudonym), *metadata_of(rules))

    async def ask(
        self,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
        message: Q,
        caller: Caller | None,
        timeout_s: float = UNARY_S,
    ) -> R:
        """Make a unary call. Raises the catalogue's error where it failed."""
        try:
            return await method(message, timeout=timeout_s, metadata=self.metadata(caller))
        except grpc.aio.AioRpcError as error:
            raise self.error(error) from error

    async def stream(
        self,
        method: grpc.aio.UnaryStreamMultiCallable[Q, R],
        message: Q,
        caller: Caller,
        timeout_s: float = STREAM_S,
    ) -> AsyncGenerator[R, None]:
        """Iterate a server stream; closing the iterator ends the call. Raises the catalogue's error."""
        call = method(message, timeout=timeout_s, metadata=self.metadata(caller))
        try:
            async for item in call:
                yield item
        except grpc.aio.AioRpcError as error:
            raise self.error(error) from error
        finally:
            call.cancel()

    def error(self, failure: grpc.aio.AioRpcError) -> HiveError:
        """Return what a failed call means to a caller of the gateway.

        The address of a peer stays inside; and that a peer refuses the service key is our defect, not the caller's.
        """
        error = raised(failure)
        said_by_peer = any(key == TRAILER for key, _ in failure.trailing_metadata() or ())
        if isinstance(error, Unavailable) and not said_by_peer:
            return self.unreachable()
        if isinstance(error, Unauthenticated):
            return Internal(f"the {self.name} refuses the key of this gateway", peer=self.name)
        return error

    def unreachable(self) -> Unavailable:
        """Return what a caller of the gateway is told while nobody answers there."""
        return Unavailable(f"the {self.name} cannot be reached now", peer=self.name)

    def problem(self) -> str | None:
        """Say what was wrong at the last health check, or None (a `telemetry.Check`)."""
        return self._problem

    async def check(self) -> None:
        """Ask for the peer's health and remember the answer."""
        try:
            answer = await self._health(HealthCheckRequest(), timeout=HEALTH_S)
            serving = answer.status == HealthCheckResponse.SERVING
            self._problem = None if serving else f"the {self.name} says that it does not serve"
        except grpc.aio.AioRpcError as failure:
            self._problem = f"the {self.name} does not answer: {failure.code().name}"
        _UP.labels(self.name).set(self._problem is None)

    async def close(self) -> None:
        """Close the channel."""
        await self.channel.close()


class Peers:
    """All services behind the gateway, with their stubs.

    Args:
        addresses: `config.peers`; MUST name each of `settings.PEERS`.
        key: what services show each other.
    """

    def __init__(self, addresses: Mapping[str, str], key: str) -> None:
        self.scheduler = Peer("scheduler", addresses["scheduler"], key)
        self.registry = Peer("registry", addresses["registry"], key)
        self.audit = Peer("audit", addresses["audit"], key)
        self.router = Peer("router", addresses["router"], key)
        self.jobs = jobs_pb2_grpc.JobsStub(self.scheduler.channel)
        self.approvals = approvals_pb2_grpc.ApprovalsStub(self.scheduler.channel)
        self.canaries = canaries_pb2_grpc.CanariesStub(self.scheduler.channel)
        self.pain = pain_pb2_grpc.PainStub(self.scheduler.channel)
        self.intake = jobs_pb2_grpc.IntakeStub(self.scheduler.channel)
        self.executors = executors_pb2_grpc.ExecutorsStub(self.registry.channel)
        self.control = control_pb2_grpc.ControlStub(self.registry.channel)
        self.agents = agents_pb2_grpc.AgentsStub(self.registry.channel)
        self.log = audit_pb2_grpc.AuditStub(self.audit.channel)
        self.models = models_pb2_grpc.ModelsStub(self.router.channel)
        self.values = values_pb2_grpc.ValuesStub(self.registry.channel)
        self.keys = keys_pb2_grpc.KeysStub(self.registry.channel)

    @property
    def all(self) -> tuple[Peer, ...]:
        """Every peer."""
        return (self.scheduler, self.registry, self.audit, self.router)

    async def watch_health(self) -> None:
        """Check all peers for ever."""
        while True:
            await asyncio.gather(*(peer.check() for peer in self.all))
            all_well = all(peer.problem() is None for peer in self.all)
            await asyncio.sleep(HEALTH_EVERY_S if all_well else HEALTH_AGAIN_S)

    async def close(self) -> None:
        """Close all channels."""
        for peer in self.all:
            await peer.close()
