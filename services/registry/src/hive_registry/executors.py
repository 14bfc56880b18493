"""The gRPC service of executors: lists and drains them, and says who may be one."""

from typing import Any, Final, Protocol

import grpc.aio
from hive_common.artifacts.documents import nearest
from hive_common.control.kill_log import KillLog
from hive_common.kernel.errors import Conflict, InvalidArgument, NotFound
from hive_common.kernel.ids import is_id
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc

from hive_registry.callers import actor_of
from hive_registry.desk import ExecutorDesk
from hive_registry.domain.executors import drain, trust, undrain
from hive_registry.domain.tokens import Enrolment
from hive_registry.enrolment import EnrolmentDesk
from hive_registry.views import ExecutorRow, Views

LIST_DEFAULT: Final = 100
LIST_MAX: Final = 1_000


class Presence(Protocol):
    """Who pulls at the moment."""

    async def present(self, min_position: int = 0, agents_of: str = "") -> dict[str, executors_pb2.Present] | None:
        """Return presence by executor id, by the log up to `min_position`; None where it cannot be asked.

        Args:
            min_position: a position of the log.
            agents_of: the executor whose records are wanted agent by agent.
        """
        ...


class ExecutorsServicer(executors_pb2_grpc.ExecutorsServicer):
    """`hive.executors.v1.Executors`.

    Args:
        views: reads.
        desk: changes.
        enrolment: who may take part.
        presence: who pulls at the moment.
        kills: which of them are stopped.
    """

    def __init__(
        self, views: Views, desk: ExecutorDesk, enrolment: EnrolmentDesk, presence: Presence, kills: KillLog
    ) -> None:
        self._views = views
        self._desk = desk
        self._enrolment = enrolment
        self._presence = presence
        self._kills = kills

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
        return self._message(row, await self._presence.present(agents_of=row.executor))

    async def Drain(
        self, request: executors_pb2.DrainRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> executors_pb2.Executor:
        """Drain an executor or take it back. Doing so twice is no error."""
        actor = actor_of(context, request.caller, "registry")
        found = await self._find(request.executor_id)
        row = await self._desk.change(
            found.executor, actor, undrain if request.undrain else lambda state: drain(state, request.reason)
        )
        return self._message(row, await self._presence.present(row.position))

    async def IssueToken(
        self, request: executors_pb2.IssueTokenRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> executors_pb2.IssueTokenResponse:
        """Make a token with which one machine may join, once."""
        actor = actor_of(context, request.caller, "registry")
        return await self._enrolment.issue(request.valid_s, request.owner, actor)

    async def Enrol(
        self, request: executors_pb2.EnrolRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> executors_pb2.Credentials:
        """Take a machine in."""
        return await self._enrolment.enrol(
            Enrolment(request.token_id, request.secret, request.public_key, request.name, request.proof)
        )

    async def Renew(
        self, request: executors_pb2.RenewRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> executors_pb2.Credentials:
        """Give an executor, which the gateway has recognised, new credentials."""
        if not is_id(request.executor_id):
            raise InvalidArgument("executor_id: expected the id of an executor", path="executor_id")
        return await self._enrolment.renew(request.executor_id)

    async def Revoke(
        self, request: executors_pb2.RevokeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> executors_pb2.Executor:
        """Shut an executor out, for ever. Doing so twice is no error."""
        actor = actor_of(context, request.caller, "registry")
        found = await self._find(request.executor_id)
        row = await self._enrolment.revoke(found.executor, request.reason, actor)
        return self._message(row, await self._presence.present(row.position))

    async def Trust(
        self, request: executors_pb2.TrustRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> executors_pb2.Executor:
        """Begin new records of an executor. Doing so twice begins them twice."""
        actor = actor_of(context, request.caller, "registry")
        found = await self._find(request.executor_id)
        row = await self._desk.change(found.executor, actor, lambda state: trust(state, request.reason))
        return self._message(row, await self._presence.present(row.position, row.executor))

    async def Keys(
        self, request: executors_pb2.KeysRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> executors_pb2.KeysResponse:
        """Return the public keys of those that are enrolled."""
        if len(request.executor_ids) > LIST_MAX:
            raise InvalidArgument(f"executor_ids: expected at most {LIST_MAX}", path="executor_ids")
        rows = await self._views.executors(list(request.executor_ids))
        return executors_pb2.KeysResponse(
            keys=[
                executors_pb2.Key(
                    executor_id=row.executor,
                    public_key=row.public_key,
                    owner=row.owner,
                    revoked=row.revoked_us is not None,
                )
                for row in rows.values()
                if row.public_key
            ]
        )

    async def _find(self, id_or_name: str) -> ExecutorRow:
        if not id_or_name:
            raise InvalidArgument("executor_id: is empty; expected an id or a name", path="executor_id")
        if is_id(id_or_name):
            found = await self._views.executors([id_or_name])
            if id_or_name in found:
                return found[id_or_name]
        rows = await self._views.executors_named(id_or_name) if id_or_name.isprintable() else []
        # A machine that came back under its name is meant, and not the one it was before.
        if len(rows) > 1 and (rows[1].revoked_us is None or rows[0].revoked_us is not None):
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
        told = row.told
        return executors_pb2.Executor(
            executor_id=row.executor,
            name=row.name,
            owner=row.owner,
            owner_name=row.owner_name,
            state=self._state_of(row, None if present is None else now.online),
            revoked=row.revoked_us is not None,
            capabilities_json=row.capabilities or b"",
            registered_us=row.registered_us,
            last_seen_us=max(now.last_seen_us, self._desk.last_hello_us(row.executor)),
            slots=0 if told is None else told.slots,
            running=now.running,
            position=row.position,
            reputation=None if present is None else _reputation_of(now),
        )

    def _state_of(self, row: ExecutorRow, online: bool | None) -> str:
        if row.revoked_us is not None:
            return "revoked"
        if self._kills.verifier.stopped.executor(row.executor):
            return "killed"
        if row.drained:
            return "drained"
        if online is None:
            return "unknown"
        return "online" if online else "offline"


def _reputation_of(present: executors_pb2.Present) -> executors_pb2.Reputation:
    return present.reputation if present.HasField("reputation") else executors_pb2.Reputation(standing="new")


def page_limit(limit: int) -> int:
    """Return how many to list. Raises InvalidArgument where `limit` is out of bounds; 0 takes the default."""
    if not 0 <= limit <= LIST_MAX:
        raise InvalidArgument(f"limit: got {limit}; expected 1 to {LIST_MAX}", path="limit")
    return limit or LIST_DEFAULT
