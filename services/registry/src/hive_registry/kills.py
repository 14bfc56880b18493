"""Kill orders at the registry, which decides what the next one is: verified, written down, told to everybody."""

import asyncio
import logging
from typing import Any

import grpc.aio
import msgspec
from hive_common.artifacts.documents import nearest
from hive_common.contracts.events import KillOrdered
from hive_common.contracts.messages import KILL_SUBJECT, KillOrder
from hive_common.control.kill_log import KillLog, stream_of
from hive_common.control.orders import Order, in_words, target_of
from hive_common.kernel.errors import Conflict, NotFound, VersionConflict
from hive_proto.control.v1 import control_pb2, control_pb2_grpc
from nats.aio.client import Client

from hive_registry.callers import actor_of
from hive_registry.log_access import Entry, LogAccess
from hive_registry.views import Views

log = logging.getLogger(__name__)


class KillDesk:
    """Takes kill orders, one after the other.

    Args:
        kills: the orders that the log has.
        views: whether a target is known.
        log_access: writes.
        client: connection to NATS.
    """

    def __init__(self, kills: KillLog, views: Views, log_access: LogAccess, client: Client) -> None:
        self.kills = kills
        self._views = views
        self._log = log_access
        self._client = client
        self._lock = asyncio.Lock()

    async def take(self, signed: KillOrder, actor: str) -> None:
        """Commit an order, then tell everybody. The newest one again changes nothing: an answer may have been lost.

        Raises:
            HiveError: it is refused (`Verifier.check_next`), or its target is unknown.
            Unavailable: it is not committed as far as this process knows; the same order may be sent again.
        """
        async with self._lock:
            await self.kills.catch_up()
            if signed == self.kills.verifier.signed:
                return
            order = self.kills.verifier.check_next(signed)
            if order.action == "kill":
                await self._check_known(order)
            event = KillOrdered(epoch=order.epoch, order=signed.order, signature=signed.signature)
            try:
                await self._log.commit((Entry(stream_of(self._log.ns), self.kills.version, (event,)),), actor)
            except VersionConflict as error:
                raise Conflict("another kill order came at the same time; give this one again") from error
            log.warning("kill order %d: %s %s", order.epoch, order.action, in_words(order.entry))
            # Who does not get it here gets it with the answer to its next pull, from the scheduler.
            if self._client.is_connected:
                await self._client.publish(KILL_SUBJECT, msgspec.json.encode(signed))
            await self.kills.catch_up()

    async def _check_known(self, order: Order) -> None:
        if order.scope == "executor" and not await self._views.executors([order.target]):
            raise NotFound(f"there is no executor {order.target}")
        if order.scope == "agent":
            name, _, version = order.target.partition("@")
            found = (
                await self._views.agent(name, version)
                if version
                else await self._views.versions_after(name, ("", ""), 1)
            )
            if not found:
                close = nearest(name, await self._views.agent_names())
                hint = f"; the nearest is {close}" if close and close != name else ""
                raise NotFound(f"there is no agent {order.target}{hint}", nearest=close or "")

    def check_agent(self, name: str, version: str) -> None:
        """Refuse what would bring a stopped agent in. Raises FailedPrecondition."""
        entry = self.kills.verifier.stopped.agent(name, version)
        if entry is not None:
            raise self.kills.refusal(entry)


class ControlServicer(control_pb2_grpc.ControlServicer):
    """`hive.control.v1.Control`."""

    def __init__(self, desk: KillDesk, views: Views) -> None:
        self._desk = desk
        self._views = views

    async def Order(
        self, request: control_pb2.OrderRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.Standing:
        """Take a signed order."""
        actor = actor_of(context, request.caller, "registry")
        await self._desk.take(KillOrder(order=request.order, signature=request.signature), actor)
        return await self._standing()

    async def State(
        self, request: control_pb2.StateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> control_pb2.Standing:
        """Say what is stopped, as the log has it."""
        await self._desk.kills.catch_up()
        return await self._standing()

    async def _standing(self) -> control_pb2.Standing:
        kills = self._desk.kills
        signed, standing = kills.verifier.signed, kills.standing
        devices = [target for scope, target in map(target_of, standing) if scope == "executor"]
        rows = await self._views.executors(devices) if devices else {}
        return control_pb2.Standing(
            epoch=kills.verifier.epoch,
            order="" if signed is None else signed.order,
            signature="" if signed is None else signed.signature,
            stops=[
                control_pb2.Stop(
                    scope=order.scope,
                    target=order.target,
                    epoch=order.epoch,
                    reason=order.reason,
                    issued_us=order.issued_us,
                    name=rows[order.target].name if order.target in rows else "",
                )
                for order in standing.values()
            ],
        )
