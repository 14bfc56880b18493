"""Who shows which key: those of the configuration, and those that the registry has made."""

import asyncio
import hashlib
import time
from typing import Any, Final, NamedTuple

from hive_common.contracts.keys import SECRET_PREFIX
from hive_common.kernel.errors import Unauthenticated, Unavailable
from hive_proto.keys.v1 import keys_pb2

from hive_gateway.devices import KEY_FRESH_S, KEY_STALE_S, LOOKUP_S, LOOKUPS_MAX, Recent
from hive_gateway.keys import Caller, KeyRing, bearer_of
from hive_gateway.peers import Peers
from hive_gateway.rights import check_method

KEYS_MAX: Final = 10_000
SECRET_CHARACTERS_MAX: Final = 256


class _Found(NamedTuple):
    """What the registry said of a digest; `caller` is None where nobody has it."""

    caller: Caller | None
    revoked: bool
    asked_s: float


class Holders:
    """Recognises callers by their keys.

    What the registry says is believed for seconds: a key that is revoked elsewhere is refused here after
    `KEY_FRESH_S`, and one that is revoked through this gateway at once. Only digests are kept.

    Args:
        ring: keys of the configuration; the owner's is one.
        peers: the registry is among them.
    """

    def __init__(self, ring: KeyRing, peers: Peers) -> None:
        self._ring = ring
        self._peers = peers
        self._found: Recent[_Found] = Recent(KEYS_MAX)
        self._lookups = asyncio.Semaphore(LOOKUPS_MAX)
        self._asking: dict[str, asyncio.Task[_Found]] = {}

    async def caller(self, authorization: str | bytes | None) -> Caller:
        """Return who shows `authorization: Bearer <key>`.

        Raises:
            Unauthenticated: there is no such header, nobody has this key, or it was revoked.
            Unavailable: the registry has to be asked and cannot be.
        """
        try:
            return self._ring.caller(authorization)
        except Unauthenticated:
            text = authorization.decode("latin-1") if isinstance(authorization, bytes) else authorization
            secret = bearer_of(text)
            if not secret.startswith(SECRET_PREFIX) or len(secret) > SECRET_CHARACTERS_MAX:
                raise
            found = await self._look(hashlib.sha256(secret.encode()).hexdigest())
            if found.caller is None:
                raise
        if found.revoked:
            raise Unauthenticated(f"key `{found.caller.name}` was revoked")
        return found.caller

    async def caller_of_rpc(self, metadata: Any) -> Caller:
        """Return who shows a key in the metadata of a gRPC call. Raises as `caller`."""
        return await self.caller(dict(metadata or ()).get("authorization"))

    async def authorise_rpc(self, method: str, metadata: Any) -> None:
        """Refuse a gRPC call without a key, or with one that may not make it."""
        check_method(await self.caller_of_rpc(metadata), method)

    def forget(self) -> None:
        """Ask the registry again about every key: one was revoked."""
        self._found = Recent(KEYS_MAX)
        # What is being asked may be answered as it was before.
        self._asking = {}

    async def _look(self, digest: str) -> _Found:
        known = self._found.get(digest)
        if known is not None and time.monotonic() - known.asked_s < KEY_FRESH_S:
            return known
        task = self._asking.get(digest)
        if task is None:
            task = self._asking[digest] = asyncio.create_task(self._ask(digest, known, self._found))
            task.add_done_callback(lambda _: self._asking.pop(digest, None))
        # Others may wait for the same key; one of them who leaves must not take it away.
        return await asyncio.shield(task)

    async def _ask(self, digest: str, known: _Found | None, found: Recent[_Found]) -> _Found:
        asked_s = time.monotonic()
        message = keys_pb2.FindRequest(digest=digest)
        try:
            async with self._lookups:
                answer = await self._peers.registry.ask(self._peers.keys.Find, message, None, LOOKUP_S)
        except Unavailable:
            if known is None or asked_s - known.asked_s > KEY_STALE_S:
                raise
            return known
        said = _Found(None, False, asked_s)
        if answer.HasField("key"):
            said = _Found(_caller(answer.key), answer.key.revoked_us > 0, asked_s)
        # Into the one that was there when it was asked: what was forgotten meanwhile stays so.
        found.put(digest, said)
        return said


def _caller(key: keys_pb2.Key) -> Caller:
    scope = "admin" if key.scope == "admin" else "user"
    return Caller(key.name, scope, key.pseudonym, key.pin, key.counts_only, key.cloud)  # type: ignore[arg-type]
