"""The gRPC service of API keys."""

import secrets
from collections.abc import Callable
from typing import Any, Final

import grpc.aio
from hive_common.contracts.events import Event, KeyCreated
from hive_common.contracts.keys import SECRET_PREFIX
from hive_common.inference.calls import PIN_ANY
from hive_common.kernel.errors import NotFound, VersionConflict
from hive_common.kernel.ids import derive_id
from hive_proto.keys.v1 import keys_pb2, keys_pb2_grpc

from hive_registry.callers import actor_of
from hive_registry.domain.keys import NEVER_CREATED, USER, KeyState, create, revoke
from hive_registry.domain.tokens import digest_of_secret
from hive_registry.executors import page_limit
from hive_registry.key_views import KeyRow, KeyViews
from hive_registry.log_access import TRIES_MAX, LogAccess

_SECRET_BYTES: Final = 32
_REGISTRY: Final = "registry"


class KeysServicer(keys_pb2_grpc.KeysServicer):
    """`hive.keys.v1.Keys`.

    Args:
        views: reads.
        log: writes.
    """

    def __init__(self, views: KeyViews, log: LogAccess) -> None:
        self._views = views
        self._log = log

    async def Create(
        self, request: keys_pb2.CreateRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> keys_pb2.Created:
        """Make a key. The same digest again, with all else the same, is no error."""
        secret = "" if request.digest else SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
        key = KeyCreated(
            name=request.name,
            digest=request.digest or digest_of_secret(secret),
            scope=request.scope or USER,
            pin=request.pin or PIN_ANY,
            counts_only=request.counts_only,
            cloud=request.cloud,
        )
        actor = actor_of(context, request.caller, _REGISTRY)
        row = await self._change(request.name, lambda state: create(state, key), actor)
        return keys_pb2.Created(key=_message(row), secret=secret)

    async def List(
        self, request: keys_pb2.ListRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> keys_pb2.ListResponse:
        """Return a page of keys, in order of names."""
        rows = await self._views.after(request.after, page_limit(request.limit))
        return keys_pb2.ListResponse(keys=[_message(row) for row in rows])

    async def Get(self, request: keys_pb2.GetRequest, context: grpc.aio.ServicerContext[Any, Any]) -> keys_pb2.Key:
        """Return one key."""
        row = await self._views.named(request.name)
        if row is None:
            raise NotFound(f"there is no key `{request.name[:80]}`; see: hive key list")
        return _message(row)

    async def Revoke(
        self, request: keys_pb2.RevokeRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> keys_pb2.Key:
        """Shut a key out, for ever."""
        actor = actor_of(context, request.caller, _REGISTRY)
        return _message(
            await self._change(request.name, lambda state: revoke(state, request.name, request.reason), actor)
        )

    async def Find(
        self, request: keys_pb2.FindRequest, context: grpc.aio.ServicerContext[Any, Any]
    ) -> keys_pb2.FindResponse:
        """Say whose secret has a digest."""
        row = await self._views.with_digest(request.digest)
        return keys_pb2.FindResponse(key=None if row is None else _message(row))

    async def _change(self, name: str, decide: Callable[[KeyState], tuple[Event, ...]], actor: str) -> KeyRow:
        for tries_left in reversed(range(TRIES_MAX)):
            row = await self._views.named(name)
            state = NEVER_CREATED if row is None else row.state
            events = decide(state)
            if row is not None and not events:
                return row
            try:
                await self._log.append(derive_id("key", self._log.ns, name), state.version, events, actor)
                break
            except VersionConflict:
                if not tries_left:
                    raise
                await self._log.catch_up()
        row = await self._views.named(name)
        if row is None:
            raise NotFound(f"there is no key `{name[:80]}`; see: hive key list")
        return row


def _message(row: KeyRow) -> keys_pb2.Key:
    return keys_pb2.Key(
        name=row.name,
        scope=row.scope,
        pin=row.pin,
        counts_only=row.counts_only,
        cloud=row.cloud,
        created_us=row.created_us,
        revoked_us=row.revoked_us,
        pseudonym=row.pseudonym,
        position=row.position,
    )
