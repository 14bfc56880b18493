"""What the registry does with kept values: `hive.exec.<id>.call.kv`."""

import asyncio
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, Final

import grpc.aio
import msgspec
from hive_common.contracts.events import AttemptFailed, AttemptLost, KvStaged, KvWrite, decode
from hive_common.contracts.limits import KV_KEYS_MAX
from hive_common.contracts.messages import KvReply, KvRequest
from hive_common.eventlog.log import LogReader
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument, NotFound, VersionConflict, body_of
from hive_common.kernel.ids import derive_id
from hive_common.permissions import check_kv
from hive_common.permissions.actions import (
    Action,
    check_approved,
    kv_list_action,
    kv_read_action,
    kv_write_action,
)
from hive_common.permissions.kept import is_key, is_namespace, is_prefix
from hive_common.permissions.tokens import Claims, Verifier
from hive_proto.values.v1 import values_pb2, values_pb2_grpc

from hive_registry.callers import actor_of
from hive_registry.domain.kv import check_writes, stage
from hive_registry.kv_views import ENDS, KvViews
from hive_registry.log_access import Entry, LogAccess

MESSAGE_VERSION: Final = 1
TRIES_MAX: Final = 5
LIMIT_DEFAULT: Final = 100
_ENDS_MAX: Final = 1_000


class KvDesk:
    """Answers executors, for the attempts whose tokens they show.

    Args:
        views: reads.
        log: writes, and waits until the views contain what was written.
        ends: reads how attempts ended.
        verifier: of capability tokens; None where this registry was never told their key.
        clock: tells when they expire.
        owner: pseudonym of whose namespaces they are.
        ns: the namespace of the installation.
    """

    def __init__(
        self,
        views: KvViews,
        log: LogAccess,
        ends: LogReader,
        verifier: Verifier | None,
        clock: Clock,
        owner: str,
        ns: str,
    ) -> None:
        self._views = views
        self._log = log
        self._ends = ends
        self._verifier = verifier
        self._clock = clock
        self._owner = owner
        self._ns = ns
        # One decision at a time for each namespace: they would only meet each other at its version.
        self._deciding: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)

    async def call(self, executor: str, request: KvRequest) -> KvReply:
        """Answer one request.

        Raises:
            PermissionDenied: the token is none, another's, expired, or for another namespace; or a person has to be
                asked, and did not approve of this.
            InvalidArgument: the request.
            BudgetExhausted: the quota.
            FailedPrecondition: the attempt has ended.
            Conflict: the attempt has staged something else before.
            Unavailable: the log or the views cannot be reached.
        """
        if request.v != MESSAGE_VERSION:
            raise InvalidArgument(f"v: got {request.v}; expected {MESSAGE_VERSION}", path="v")
        if self._verifier is None:
            raise FailedPrecondition(
                "the registry has no key to check capability tokens with: start it with `hive up`"
            )
        claims = self._verifier.verify(request.token, executor=executor, now_us=self._clock.now_us())
        check_kv(claims.permissions, request.namespace)
        if "kv" in claims.permissions.asks:
            for action in _actions(claims.agent, request):
                check_approved(claims.permissions, claims.approved, action)
        match request.op:
            case "get":
                return await self.get(request.namespace, request.key)
            case "list":
                return await self.list(request.namespace, request.prefix, request.after, request.limit)
            case "stage":
                return await self._stage(executor, claims, request)
        raise InvalidArgument(f"op: got {request.op[:40]!r}; expected get, list or stage", path="op")

    def stream_of(self, namespace: str) -> str:
        """Return the stream of a namespace."""
        return derive_id("kv", self._ns, self._owner, namespace)

    async def get(self, namespace: str, key: str) -> KvReply:
        """Return a value, as all attempts left it that have decided their task by now."""
        if not is_key(key):
            raise InvalidArgument(f"key: {key[:80]!r} is no key", path="key")
        await self._log.catch_up()
        value = await self._views.value(self.stream_of(namespace), key)
        return KvReply() if value is None else KvReply(value=msgspec.Raw(value))

    async def list(self, namespace: str, prefix: str, after: str, limit: int) -> KvReply:
        """Return a page of keys."""
        if not is_prefix(prefix) or not is_prefix(after):
            raise InvalidArgument("prefix, after: expected what keys consist of", path="prefix")
        if not 1 <= limit <= KV_KEYS_MAX:
            raise InvalidArgument(f"limit: got {limit}; expected 1 to {KV_KEYS_MAX}", path="limit")
        await self._log.catch_up()
        found = await self._views.keys(self.stream_of(namespace), prefix, after, limit + 1)
        return KvReply(keys=tuple(found[:limit]), more=len(found) > limit)

    async def delete(self, namespace: str, key: str, actor: str) -> None:
        """Remove a value as the owner, whom no attempt has to confirm."""
        if not is_key(key):
            raise InvalidArgument(f"key: {key[:80]!r} is no key", path="key")
        stream = self.stream_of(namespace)
        async with self._deciding[stream]:
            for tries_left in reversed(range(TRIES_MAX)):
                await self._log.catch_up()
                state = await self._views.namespace(stream, [key])
                if key not in state.sizes:
                    return
                event = KvStaged(namespace=namespace, task="", attempt=0, writes=(KvWrite(key),))
                try:
                    await self._log.append(stream, state.version, (event,), actor)
                except VersionConflict:
                    if not tries_left:
                        raise
                else:
                    return

    async def _stage(self, executor: str, claims: Claims, request: KvRequest) -> KvReply:
        check_writes(request.writes)
        assert claims.permissions.kv is not None
        stream = self.stream_of(request.namespace)
        keys = [write.key for write in request.writes]
        async with self._deciding[stream]:
            for tries_left in reversed(range(TRIES_MAX)):
                await self._log.catch_up()
                state = await self._views.namespace(stream, keys)
                events = stage(
                    state,
                    request.namespace,
                    claims.task,
                    claims.attempt,
                    request.writes,
                    claims.permissions.kv.quota_bytes,
                )
                if not events:
                    return KvReply()
                # An end that comes between the look and the write would leave what is staged there for ever.
                expect = {claims.task: await self._check_live(claims)}
                try:
                    await self._log.append_all((Entry(stream, state.version, events),), executor, expect)
                except VersionConflict:
                    if not tries_left:
                        raise
                else:
                    return KvReply()
        raise AssertionError("unreachable")

    async def _check_live(self, claims: Claims) -> int:
        """Refuse what can never count, which would only take room; return the version of the task's stream."""
        version = (await self._ends.versions([claims.task]))[claims.task]
        for end in await self._ends.read(0, _ENDS_MAX, types=ENDS, streams=[claims.task]):
            event = decode(end.type, end.schema, end.payload or b"")
            if not isinstance(event, AttemptFailed | AttemptLost) or event.attempt == claims.attempt:
                raise FailedPrecondition(f"attempt {claims.attempt} of task {claims.task} has ended")
        return version


class ValuesServicer(values_pb2_grpc.ValuesServicer):
    """`hive.values.v1.Values`, for the owner of the namespaces."""

    def __init__(self, desk: KvDesk) -> None:
        self._desk = desk

    async def Get(
        self, request: values_pb2.GetRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> values_pb2.Found:
        """Return a value."""
        _check_namespace(request.namespace)
        value = (await self._desk.get(request.namespace, request.key)).value
        if isinstance(value, msgspec.UnsetType):
            raise NotFound(f"{request.namespace} has no key {request.key}")
        return values_pb2.Found(value=bytes(value))

    async def List(
        self, request: values_pb2.ListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> values_pb2.Page:
        """Return a page of keys."""
        _check_namespace(request.namespace)
        limit = request.limit or LIMIT_DEFAULT
        page = await self._desk.list(request.namespace, request.prefix, request.after, limit)
        return values_pb2.Page(keys=page.keys, more=page.more)

    async def Delete(
        self, request: values_pb2.DeleteRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> values_pb2.Deleted:
        """Remove a key."""
        _check_namespace(request.namespace)
        await self._desk.delete(request.namespace, request.key, actor_of(context, request.caller, "registry"))
        return values_pb2.Deleted()


def _check_namespace(namespace: str) -> None:
    if not is_namespace(namespace):
        raise InvalidArgument(
            f"namespace: got {namespace[:80]!r}; expected a-z, 0-9, `.`, `_` and `-`, at most 63", path="namespace"
        )


def _actions(agent: str, request: KvRequest) -> Iterator[Action]:
    """Yield what a request wants to do, as a person is asked about it."""
    match request.op:
        case "get":
            yield kv_read_action(agent, request.namespace, request.key)
        case "list":
            yield kv_list_action(agent, request.namespace, request.prefix)
        case "stage":
            for write in request.writes:
                yield kv_write_action(agent, request.namespace, write)


def kv_refused(error: BaseException) -> KvReply:
    """Return the reply that carries an error."""
    return KvReply(error=body_of(error))
