"""Answers that are the same each time: those of calls at temperature 0 with a seed, kept in a server that speaks
Redis's protocol. Off unless it is configured; whatever is wrong with it, calls go on without.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncGenerator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import msgspec
from hive_common.inference.bodies import decode
from hive_common.inference.calls import PIN_ANY, ModelCall
from hive_common.inference.config import CacheConfig
from hive_common.inference.sse import Events
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import read_secret

from hive_router.domain.selection import BackEnd, model_of
from hive_router.metrics import CACHED

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

CACHE: Final = "cache"
"""The route of what comes from it."""

WITHIN_S: Final = 0.05
"""A call waits no longer for it; it is meant to be next to the router."""

LEAVE_ALONE_S: Final = 5.0
"""Once it did not answer, calls go without it for so long."""

ENTRY_BYTES_MAX: Final = 1 << 20
PRINTS_MAX: Final = 8
"""Versions of a model that are looked for."""

STORING_MAX: Final = 64
"""Answers on their way to it; more are not kept."""

CONNECTIONS_MAX: Final = 256
_PREFIX: Final = "hive:answer:"
_FIELDS: Final = 'config `cache: {url: "redis://127.0.0.1:6379/0", ttl: 3600}`'


class Entry(msgspec.Struct, frozen=True):
    """An answer as its caller had it: JSON, or the events of a stream."""

    status: int
    content_type: str
    prompt_tokens: int
    completion_tokens: int
    body: bytes

    def events(self) -> tuple[bytes, AsyncGenerator[bytes, None]]:
        """Return the first event of a stream, and the others."""
        first, *rest = Events(len(self.body) + 1).feed(self.body)
        return first, _each(rest)


class _Kept(msgspec.Struct, frozen=True):
    """`key` stands in it as well: an answer that came for another question is none."""

    key: str
    entry: Entry


class Asking(msgspec.Struct, frozen=True):
    """What a call asks, in one form, and for whom: nothing is ever answered to somebody else."""

    tenant: tuple[str, ...]
    endpoint: str
    body: bytes

    def key(self, print_: str) -> str:
        """Return the key of the answer that a version of a model gives."""
        digest = hashlib.sha256(msgspec.json.encode((self.tenant, self.endpoint, print_)))
        digest.update(b"\n")
        digest.update(self.body)
        return _PREFIX + digest.hexdigest()


def asking(call: ModelCall, body: bytes, owner: str) -> Asking | None:
    """Return what a call asks, if its answer is the same each time and may be kept; else None.

    Args:
        call: as it came.
        body: as a back end gets it.
        owner: whose call it is.
    """
    # What may not leave some devices may not be kept anywhere else, and what is not to be kept is not.
    if call.counts_only or call.pin != PIN_ANY or call.endpoint == "embeddings":
        return None
    if b'"seed"' not in body or b'"temperature"' not in body:
        return None
    fields = decode(body, dict[str, Any])
    temperature, seed = fields.get("temperature"), fields.get("seed")
    if isinstance(temperature, bool) or temperature != 0 or isinstance(seed, bool) or not isinstance(seed, int):
        return None
    # Of guests, each job is by itself: with which key it was submitted is not known here.
    tenant = (owner, call.key, call.caller, call.origin and (call.job or call.origin))
    return Asking(tenant, call.endpoint, msgspec.json.encode(fields, order="sorted"))


def fingerprint(backend: BackEnd, name: str) -> str:
    """Return what tells one version of a model from another: its digest, and else all that is known of it."""
    model = model_of(backend, name)
    if model is None:
        return ""
    known = (model.name, model.digest, model.backend, model.family, model.size_bytes, model.quantisation)
    return hashlib.sha256(msgspec.json.encode((*known, model.context_tokens, backend.provider))).hexdigest()


class ResponseCache:
    """Finds and keeps answers.

    Args:
        config: where, and for how long.

    Raises:
        InvalidArgument: the configuration cannot be used, or the library is not installed.
    """

    def __init__(self, config: CacheConfig) -> None:
        self._redis = _client(config)
        self._ttl_s = config.ttl
        self._alone_until_s = 0.0
        self._storing: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        """Close the connections; what is being stored is dropped."""
        for task in tuple(self._storing):
            task.cancel()
        if self._storing:
            await asyncio.wait(self._storing)
        await self._redis.aclose()

    async def find(self, asked: Asking, prints: Sequence[str]) -> Entry | None:
        """Return the answer that one of the versions of a model has given; None where none is known in time."""
        keys = [asked.key(one) for one in prints[:PRINTS_MAX]]
        if not keys or self._is_left_alone():
            return None
        try:
            async with asyncio.timeout(WITHIN_S):
                found = await self._redis.mget(keys)
        except Exception as error:  # noqa: BLE001 - of a library; a call must not fail by it
            self._failed(error)
            return None
        for key, raw in zip(keys, found, strict=False):
            entry = None if raw is None else _entry(key, raw)
            if entry is not None:
                CACHED.labels("hit").inc()
                return entry
        CACHED.labels("miss").inc()
        return None

    def store(self, asked: Asking, print_: str, entry: Entry) -> None:
        """Keep an answer, in a moment."""
        fits = len(entry.body) <= ENTRY_BYTES_MAX and entry.status == 200 and print_
        if not fits or len(self._storing) >= STORING_MAX or self._is_left_alone():
            return
        task = asyncio.create_task(self._store(asked.key(print_), entry), name="answer to keep")
        self._storing.add(task)
        task.add_done_callback(self._storing.discard)

    async def _store(self, key: str, entry: Entry) -> None:
        try:
            async with asyncio.timeout(WITHIN_S):
                await self._redis.set(key, msgspec.msgpack.encode(_Kept(key, entry)), ex=self._ttl_s)
        except Exception as error:  # noqa: BLE001 - as above
            self._failed(error)
        else:
            CACHED.labels("stored").inc()

    def _is_left_alone(self) -> bool:
        return asyncio.get_running_loop().time() < self._alone_until_s

    def _failed(self, error: Exception) -> None:
        CACHED.labels("failed").inc()
        self._alone_until_s = asyncio.get_running_loop().time() + LEAVE_ALONE_S
        log.warning("the cache of answers: %s", error or f"no answer within {WITHIN_S:g} s")


def _entry(key: str, raw: bytes | str) -> Entry | None:
    if isinstance(raw, str):
        return None
    try:
        kept = msgspec.msgpack.decode(raw, type=_Kept)
    except (msgspec.DecodeError, RecursionError):
        return None
    return kept.entry if kept.key == key and kept.entry.body else None


def _client(config: CacheConfig) -> "Redis":
    parts = urlsplit(config.url)
    if parts.scheme not in ("redis", "rediss", "unix") or config.ttl < 1:
        raise InvalidArgument(f"cache: expected {_FIELDS}", path="cache")
    if parts.username is not None or parts.password is not None or "password" in parts.query:
        text = "cache.url: a URL is shown and logged; put the password into `key_file`"
        raise InvalidArgument(text, path="cache")
    try:
        from redis.asyncio import Redis
        from redis.asyncio.retry import Retry
        from redis.backoff import NoBackoff
    except ImportError as error:
        text = "cache: needs the library `redis`; install hivefabric with its extra `cache`"
        raise InvalidArgument(text, path="cache") from error
    return Redis.from_url(
        config.url,
        password=read_secret(Path(config.key_file)) if config.key_file else None,
        socket_timeout=WITHIN_S,
        socket_connect_timeout=WITHIN_S,
        max_connections=CONNECTIONS_MAX,
        retry=Retry(NoBackoff(), 0),
    )


async def _each(events: Sequence[bytes]) -> AsyncGenerator[bytes, None]:
    for event in events:
        yield event
