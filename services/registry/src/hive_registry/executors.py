"""Executors: their hello on NATS, and the gRPC service that lists and drains them."""

from collections.abc import Callable
from typing import Any, Final, Protocol

import grpc.aio
import msgspec
from hive_common.artifacts.documents import nearest
from hive_common.contracts.events import Capabilities, Event
from hive_common.contracts.messages import HelloReply, HelloRequest
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import Conflict, InvalidArgument, NotFound, VersionConflict, body_of
from hive_common.kernel.ids import is_id
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc

from hive_registry.callers import actor_of
from hive_registry.domain.executors import UNKNOWN, ExecutorState, drain, say_hello, undrain
from hive_registry.log_access import LogAccess
from hive_registry.lookup import GatheredLookup
from hive_registry.views import ExecutorRow, Views

LIST_DEFAULT: Final = 100
LIST_MAX: Final = 1_000
TRIES_MAX: Final = 5
"""How often a decision is made anew when somebody else wrote to the same stream meanwhile."""

MESSAGE_VERSION: Final = 1


class Presence(Protocol):
    """Who pulls at the moment."""

    async def present(self) -> dict[str, executors_pb2.Present] | None:
        """Return presence by executor id, or None where it cannot be asked now."""
        ...


class ExecutorDesk:
    """What the registry does with one executor at a time: decide on its state, write, answer from the view.

    Args:
        views: reads.
        log: writes.
        clock: tells when a hello came.
        blobs_url: base URL at which executors fetch and store blobs.
    """

    def __init__(self, views: Views, log: LogAccess, clock: Clock, blobs_url: str) -> None:
        self._lookup = GatheredLookup(views.executors)
        self._log = log
        self._clock = clock
        self._blobs_url = blobs_url
        self._last_hello_us: dict[str, int] = {}

    async def hello(self, executor: str, request: HelloRequest) -> HelloReply:
        """Answer `hive.exec.<id>.hello`. What it tells is committed, and in the views, before the answer.

        Raises:
            InvalidArgument: the id, the version of the message or what it says cannot be accepted.
            Unavailable: the log or the views cannot be reached.
        """
        if not is_id(executor):
            raise InvalidArgument("the subject's third token is not an executor id; expected a UUID")
        if request.v != MESSAGE_VERSION:
            raise InvalidArgument(f"v: got {request.v}; expected {MESSAGE_VERSION}", path="v")
        row = await self.change(
            executor, executor, lambda state: say_hello(state, request.name, request.capabilities)
        )
        self._last_hello_us[executor] = self._clock.now_us()
        return HelloReply(position=row.position, blobs_url=self._blobs_url, drained=row.drained)

    async def change(
        self, executor: str, actor: str, decide: Callable[[ExecutorState], tuple[Event, ...]]
    ) -> ExecutorRow:
        """Decide on the executor's state, append what comes of it, and return its row afterwards.

        Raises:
            VersionConflict: others wrote to its stream again and again.
        """
        for tries_left in reversed(range(TRIES_MAX)):
            row = await self._lookup.get(executor)
            state = UNKNOWN if row is None else row.state
            events = decide(state)
            if not events and row is not None:
                return row
            try:
                await self._log.append(executor, state.version, events, actor)
            except VersionConflict:
                if not tries_left:
                    raise
                await self._log.catch_up()
        row = await self._lookup.get(executor)
        if row is None:
            raise NotFound(f"there is no executor {executor}")
        return row

    def last_hello_us(self, executor: str) -> int:
        """Return when its last hello came to this process, 0 where none did."""
        return self._last_hello_us.get(executor, 0)


def hello_refused(error: BaseException) -> HelloReply:
    """Return the reply that carries an error."""
    return HelloReply(error=body_of(error))


class ExecutorsServicer(executors_pb2_grpc.ExecutorsServicer):
    """`hive.executors.v1.Executors`.

    Args:
        views: reads.
        desk: changes.
        presence: who pulls at the moment.
    """

    def __init__(self, views: Views, desk: ExecutorDesk, presence: Presence) -> None:
        self._views = views
        self._desk = desk
        self._presence = presence

    async def List(
        self, request: executors_pb2.ListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> executors_pb2.ListResponse:
        """Return a page of executors in order of their ids."""
        limit = page_limit(request.limit)
        if request.after and not is_id(request.after):
            raise InvalidArgument("after: expected an executor id", path="after")
        rows = await self._views.executors_after(request.after, limit)
        present = await self._presence.present()
        return executors_pb2.ListResponse(executors=[self._message(row, present) for row in rows])

    async def Get(
        self, request: executors_pb2.GetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> executors_pb2.Executor:
        """Return one executor by id or name."""
        row = await self._find(request.executor_id)
        return self._message(row, await self._presence.present())

    async def Drain(
        self, request: executors_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> executors_pb2.Executor:
        """Drain an executor or take it back. Doing so twice is no error."""
        actor = actor_of(context, request.caller, "registry")
        found = await self._find(request.executor_id)
        row = await self._desk.change(
            found.executor, actor, undrain if request.undrain else lambda state: drain(state, request.reason)
        )
        return self._message(row, await self._presence.present())

    async def _find(self, id_or_name: str) -> ExecutorRow:
        if not id_or_name:
            raise InvalidArgument("executor_id: is empty; expected an id or a name", path="executor_id")
        if is_id(id_or_name):
            found = await self._views.executors([id_or_name])
            if id_or_name in found:
                return found[id_or_name]
        rows = await self._views.executors_named(id_or_name) if id_or_name.isprintable() else []
        if len(rows) > 1:
            raise Conflict(f"several executors have the name {id_or_name}; expected the id of one of them")
        if not rows:
            close = nearest(id_or_name, await self._views.executor_names())
            hint = f"; the nearest is {close}" if close else ""
            raise NotFound(f"there is no executor {id_or_name!r}{hint}", nearest=close or "")
        return rows[0]

    def _message(
        self, row: ExecutorRow, present: dict[str, executors_pb2.Present] | None
    ) -> executors_pb2.Executor:
        now = (present or {}).get(row.executor) or executors_pb2.Present()
        capabilities = msgspec.json.decode(row.capabilities, type=Capabilities)
        return executors_pb2.Executor(
            executor_id=row.executor,
            name=row.name,
            owner=row.owner,
            state=_state_of(row.drained, None if present is None else now.online),
            capabilities_json=row.capabilities,
            registered_us=row.registered_us,
            last_seen_us=max(now.last_seen_us, self._desk.last_hello_us(row.executor)),
            slots=capabilities.slots,
            running=now.running,
            position=row.position,
        )


def _state_of(drained: bool, online: bool | None) -> str:
    if drained:
        return "drained"
    if online is None:
        return "unknown"
    return "online" if online else "offline"


def page_limit(limit: int) -> int:
    """Return how many to list. Raises InvalidArgument where `limit` is out of bounds; 0 takes the default."""
    if not 0 <= limit <= LIST_MAX:
        raise InvalidArgument(f"limit: got {limit}; expected 1 to {LIST_MAX}", path="limit")
    return limit or LIST_DEFAULT
