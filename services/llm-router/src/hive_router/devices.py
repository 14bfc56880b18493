"""The devices of the pool: kept like the view, and marked by who is there."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Final

import grpc.aio
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.kernel.errors import HiveError, Unavailable
from hive_common.rpc.client import bearer, call, open_channel
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc

from hive_router.domain.selection import CORE, BackEnd
from hive_router.fleet import Fleet
from hive_router.settings import RouterSettings
from hive_router.views import ExecutorRow, Views

log = logging.getLogger(__name__)

PRESENCE_WITHIN_S: Final = 1.0
RETRY_S: Final = 1.0


class Devices:
    """Brings the fleet up to date.

    Args:
        views: what the log says of devices.
        fleet: is kept current.
        settings: how often to ask who is there; the executors of the host, which are no devices of the pool.
        scheduler: its address, or None where the configuration names none. Without it a device is taken to be
            there until NATS says that nobody listens.
        key: what services show each other.
        changed: is called when something may be different.

    Attributes:
        on_gone: are told of each device that was there and is not any more.
    """

    def __init__(
        self,
        views: Views,
        fleet: Fleet,
        settings: RouterSettings,
        scheduler: str | None,
        key: str,
        *,
        changed: Callable[[], None],
    ) -> None:
        self._views = views
        self._fleet = fleet
        self._settings = settings
        self._channel: grpc.aio.Channel | None = None if scheduler is None else open_channel(scheduler)
        self._metadata = bearer(key)
        self._changed = changed
        self.on_gone: list[Callable[[str], None]] = []
        self._position = 0
        self._moved = asyncio.Event()
        self._rows: dict[str, ExecutorRow] = {}
        self._absent: dict[str, float] = {}
        self._away: frozenset[str] = frozenset()

    async def close(self) -> None:
        """Close the channel to the scheduler."""
        if self._channel is not None:
            await self._channel.close()

    def owner_of(self, executor: str) -> str | None:
        """Return whose device an executor is; None for one that is unknown or revoked."""
        row = self._rows.get(executor)
        return None if row is None or row.revoked else row.owner

    def is_core(self, executor: str) -> bool:
        """Say whether a device is of tier `core`."""
        row = self._rows.get(executor)
        return row is not None and row.capabilities.tier == CORE

    def known(self) -> Iterable[str]:
        """Return the executors that are not revoked."""
        return [executor for executor, row in self._rows.items() if not row.revoked]

    def moved(self, position: int) -> None:
        """Note that the view changes at a position of the log, in a transaction that is about to be committed."""
        self._position = position
        self._moved.set()

    async def run(self, runner: ProjectionRunner) -> None:
        """Follow the view for ever."""
        while True:
            try:
                await runner.wait_for(self._position)
                await self.load()
            except Unavailable as error:
                if runner.failure is not None:
                    raise
                log.warning("devices of the pool: %s", error.message)
                await asyncio.sleep(RETRY_S)
                continue
            await self._moved.wait()
            self._moved.clear()

    async def load(self) -> None:
        """Read the view. Raises Unavailable while the database cannot be reached."""
        rows = {row.executor: row for row in await self._views.executors()}
        revoked = [key for key, row in rows.items() if row.revoked and not self._revoked(key)]
        self._rows = rows
        self._update()
        self._gone(revoked)

    async def watch(self) -> None:
        """Ask for ever who is there."""
        while True:
            await self.ask()
            await asyncio.sleep(self._settings.presence_ms / 1000)

    async def ask(self) -> None:
        """Ask the scheduler who is there. While it cannot be asked, what it said last counts."""
        if self._channel is None:
            return
        stub = executors_pb2_grpc.PresenceStub(self._channel)
        request = executors_pb2.PresenceRequest()
        try:
            answer = await call(stub.List(request, timeout=PRESENCE_WITHIN_S, metadata=self._metadata))
        except HiveError as error:
            log.debug("presence: %s", error.message)
            return
        online = {one.executor_id for one in answer.executors if one.online}
        now_s = asyncio.get_running_loop().time()
        for executor in self._rows:
            if executor in online:
                self._absent.pop(executor, None)
            else:
                self._absent.setdefault(executor, now_s)
        # A scheduler that has just begun to lead has seen nobody yet; that must end no stream.
        grace_s = self._settings.absent_ms / 1000
        away = frozenset(one for one, since_s in self._absent.items() if now_s - since_s >= grace_s)
        if away != self._away:
            before, self._away = self._away, away
            self._update()
            self._gone(away - before)

    def _gone(self, executors: Iterable[str]) -> None:
        for executor in executors:
            for told in self.on_gone:
                told(executor)

    def _revoked(self, executor: str) -> bool:
        row = self._rows.get(executor)
        return row is not None and row.revoked

    def _update(self) -> None:
        host = self._settings.host_executors
        pool = {key: row for key, row in self._rows.items() if key not in host}
        self._fleet.keep(set(pool))
        slots = self._settings.in_flight_max
        self._fleet.put(*(_back_end(row, slots, key not in self._away) for key, row in pool.items()))
        if host and host[0] in self._rows:
            capabilities = self._rows[host[0]].capabilities
            for backend in self._fleet:
                if backend.is_host:
                    backend.region = capabilities.labels.get("region", "")
                    backend.power = capabilities.power
                    backend.tier = capabilities.tier
        self._changed()


def _back_end(row: ExecutorRow, slots: int, online: bool) -> BackEnd:
    return BackEnd(
        id=row.executor,
        executor=row.executor,
        name=row.name,
        owner=row.owner,
        is_host=False,
        models={model.name: model for model in row.capabilities.models},
        slots=slots,
        region=row.capabilities.labels.get("region", ""),
        power=row.capabilities.power,
        online=online,
        drained=row.drained,
        revoked=row.revoked,
        tier=row.capabilities.tier,
    )
