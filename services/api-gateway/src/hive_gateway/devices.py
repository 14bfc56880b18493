"""Executors that call: recognised by what they sign, against the keys that the registry has of them."""

import asyncio
import time
from collections import OrderedDict
from typing import Final, Generic, NamedTuple, TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hive_common.bus import assertion
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import PermissionDenied, Unauthenticated, Unavailable
from hive_common.kernel.nkey import public_key
from hive_proto.executors.v1 import executors_pb2

from hive_gateway.keys import Caller
from hive_gateway.peers import Peers

KEY_FRESH_S: Final = 2.0
"""So long after its revocation an executor may still be let in here."""

KEY_STALE_S: Final = 30.0
"""So long a key is still used while the registry, which alone can revoke it, cannot be asked."""

KEYS_MAX: Final = 10_000
VERIFIED_MAX: Final = 20_000
LOOKUPS_MAX: Final = 32
"""Questions to the registry at the same time. Who makes up ids gets in line with others who do."""

LOOKUP_S: Final = 5.0
_US: Final = 1_000_000
V = TypeVar("V")


class Recent(Generic[V]):
    """A dictionary of bounded size: what was not used for longest goes first."""

    def __init__(self, entries_max: int) -> None:
        self._entries: OrderedDict[str, V] = OrderedDict()
        self._entries_max = entries_max

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: str) -> V | None:
        """Return what is there, or None."""
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
        return found

    def put(self, key: str, value: V) -> None:
        """Keep a value."""
        self._entries[key] = value
        self._entries.move_to_end(key)
        if len(self._entries) > self._entries_max:
            self._entries.popitem(last=False)


class _Key(NamedTuple):
    """What the registry said about an executor. `text` is empty where it does not know it."""

    text: str
    public: Ed25519PublicKey | None
    revoked: bool
    asked_s: float


class _Verified(NamedTuple):
    executor: str
    key: str
    expires_s: float


class Devices:
    """Recognises executors.

    Args:
        peers: the registry is among them.
        clock: of this machine, that of devices is compared with.
    """

    def __init__(self, peers: Peers, clock: Clock) -> None:
        self._peers = peers
        self._clock = clock
        self._keys: Recent[_Key] = Recent(KEYS_MAX)
        self._verified: Recent[_Verified] = Recent(VERIFIED_MAX)
        self._lookups = asyncio.Semaphore(LOOKUPS_MAX)
        self._asking: dict[str, asyncio.Task[_Key]] = {}

    async def caller(self, token: str) -> Caller:
        """Return which executor shows the assertion `token`.

        Raises:
            Unauthenticated: it is not good, or nobody knows that executor.
            PermissionDenied: the executor is revoked.
            Unavailable: the registry has to be asked and cannot be.
        """
        now_s = self._clock.now_us() / _US
        known = self._verified.get(token)
        if known is not None and now_s < known.expires_s:
            key = await self._key(known.executor)
            if key.text == known.key and not key.revoked:
                return _caller(known.executor)
        if len(token) > assertion.CHARACTERS_MAX:
            raise Unauthenticated("the executor's assertion is too long")
        executor = assertion.executor_of(token)
        key = await self._key(executor)
        if key.public is None:
            raise Unauthenticated(f"executor {executor} is not enrolled here; join with: hive executor join TOKEN")
        verified = assertion.verify(token, key.public, now_s)
        if key.revoked:
            raise PermissionDenied(
                "this executor was revoked, for ever; to come back it joins anew", reason="revoked"
            )
        self._verified.put(token, _Verified(executor, key.text, verified.expires_s))
        return _caller(executor)

    async def _key(self, executor: str) -> _Key:
        known = self._keys.get(executor)
        if known is not None and time.monotonic() - known.asked_s < KEY_FRESH_S:
            return known
        task = self._asking.get(executor)
        if task is None:
            task = self._asking[executor] = asyncio.create_task(self._ask(executor, known))
            task.add_done_callback(lambda _: self._asking.pop(executor, None))
        # Others may wait for the same key; one of them who leaves must not take it away.
        return await asyncio.shield(task)

    async def _ask(self, executor: str, known: _Key | None) -> _Key:
        asked_s = time.monotonic()
        message = executors_pb2.KeysRequest(executor_ids=[executor])
        try:
            async with self._lookups:
                answer = await self._peers.registry.ask(self._peers.executors.Keys, message, None, LOOKUP_S)
        except Unavailable:
            if known is None or asked_s - known.asked_s > KEY_STALE_S:
                raise
            return known
        key = _Key("", None, False, asked_s)
        for one in answer.keys:
            key = _Key(one.public_key, public_key(one.public_key), one.revoked, asked_s)
        self._keys.put(executor, key)
        return key


def is_assertion(token: str) -> bool:
    """Say whether a bearer token has the shape of a JWT (RFC 7515): its header is a JSON object in base64url."""
    return token.startswith("eyJ") and token.count(".") == 2


def _caller(executor: str) -> Caller:
    return Caller(executor, "executor", executor)
