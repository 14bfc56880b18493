"""Blobs at the gateway: fetched by digest, checked, kept on disk; stored by digest."""

import asyncio
import logging
import os
import random
import secrets
from collections import OrderedDict
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Final, Generic, TypeVar

import aiohttp
from hive_common.contracts.limits import BLOB_BYTES_MAX
from hive_common.contracts.values import digest_of, is_digest
from hive_common.kernel.errors import HiveError, InvalidArgument, NotFound, PayloadTooLarge, Unavailable

from hive_executor.gateway import Gateway
from hive_executor.metrics import BLOBS

log = logging.getLogger(__name__)
T = TypeVar("T")

_FIRST_WAIT_S: Final = 0.1
_WAIT_S_MAX: Final = 2.0
_REQUEST_TIMEOUT: Final = aiohttp.ClientTimeout(total=300, connect=5, sock_read=30)


class FolderCache:
    """Files by SHA-256 in one folder, the least recently used dropped beyond `bytes_max`.

    Several processes may share the folder: files appear whole, and a file that another process dropped is a miss.
    Methods block.
    """

    def __init__(self, folder: Path, bytes_max: int) -> None:
        self._folder = folder
        self._bytes_max = bytes_max
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        known = []
        for path in folder.iterdir():
            if path.name.endswith(".part"):
                continue
            try:
                status = path.stat()
            except FileNotFoundError:
                continue
            known.append((status.st_mtime_ns, path.name, status.st_size))
        self._sizes: OrderedDict[str, int] = OrderedDict((name, size) for _, name, size in sorted(known))
        self._bytes = sum(self._sizes.values())

    def path_of(self, digest: str) -> Path:
        """Where a blob is when it is there."""
        return self._folder / digest.removeprefix("sha256:")

    def get(self, digest: str) -> bytes | None:
        """Return a blob, or None when it is not there or not what its name says."""
        path = self.path_of(digest)
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        if digest_of(data) != digest:
            log.warning("%s: damaged, dropped", path)
            path.unlink(missing_ok=True)
            return None
        os.utime(path)
        self._touch(path.name, len(data))
        return data

    def put(self, data: bytes) -> Path:
        """Keep a blob and return its path. It stays at least until `bytes_max` of others came after it."""
        path = self.path_of(digest_of(data))
        draft = self._folder / f"{path.name}.{secrets.token_hex(4)}.part"
        try:
            draft.write_bytes(data)
            draft.replace(path)
        finally:
            draft.unlink(missing_ok=True)
        self._touch(path.name, len(data))
        while self._bytes > self._bytes_max and len(self._sizes) > 1:
            name, size = self._sizes.popitem(last=False)
            self._bytes -= size
            (self._folder / name).unlink(missing_ok=True)
        return path

    def _touch(self, name: str, size: int) -> None:
        self._bytes += size - self._sizes.get(name, 0)
        self._sizes[name] = size
        self._sizes.move_to_end(name)


class Flights(Generic[T]):
    """Runs one coroutine per key at a time; whoever asks meanwhile waits for the same result."""

    def __init__(self) -> None:
        self._flying: dict[str, asyncio.Task[T]] = {}

    async def join(self, key: str, start: Callable[[], Awaitable[T]]) -> T:
        """Return what `start` gives. That one of the waiters is cancelled disturbs nobody else."""

        async def fly() -> T:
            return await start()

        task = self._flying.get(key)
        if task is None:
            task = self._flying[key] = asyncio.create_task(fly())
            task.add_done_callback(lambda ended: self._land(key, ended))
        return await asyncio.shield(task)

    async def close(self) -> None:
        """Cancel what is under way."""
        tasks = list(self._flying.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _land(self, key: str, task: "asyncio.Task[T]") -> None:
        del self._flying[key]
        if not task.cancelled():
            task.exception()  # seen, also when nobody waits any more


class BlobClient:
    """`GET` and `PUT /v1/blobs/{digest}` at the gateway.

    Args:
        gateway: makes the calls; whoever made it closes it.
        cache: where fetched blobs stay.
        timeout_ms: how long one blob is tried, with waits in between.
    """

    def __init__(self, gateway: Gateway, cache: FolderCache, timeout_ms: int) -> None:
        self._gateway = gateway
        self._cache = cache
        self._timeout_ms = timeout_ms
        self._flights: Flights[bytes] = Flights()

    async def close(self) -> None:
        """Cancel what is under way."""
        await self._flights.close()

    async def fetch(self, digest: str) -> bytes:
        """Return a blob, checked against its digest.

        Raises:
            NotFound: the gateway does not have it.
            InvalidArgument: not a digest, or larger than any blob may be.
            Unavailable: it could not be had within the timeout.
        """
        if not is_digest(digest):
            raise InvalidArgument(f"{digest!r} is not a digest; expected sha256:<64 hex digits>")
        cached = await asyncio.to_thread(self._cache.get, digest)
        if cached is not None:
            BLOBS.labels("get", "cached").inc()
            return cached
        return await self._flights.join(digest, lambda: self._fetch_and_keep(digest))

    async def store(self, data: bytes) -> str:
        """Store bytes and return their digest.

        Raises:
            PayloadTooLarge: the gateway does not take so many.
            Unavailable: it could not be done within the timeout.
        """
        digest = await asyncio.to_thread(digest_of, data)
        await self._persist("put", digest, lambda: self._put(digest, data))
        return digest

    async def _fetch_and_keep(self, digest: str) -> bytes:
        data = await self._persist("get", digest, lambda: self._get(digest))
        try:
            await asyncio.to_thread(self._cache.put, data)
        except OSError as error:
            log.warning("a blob could not be cached: %s", error)
        return data

    async def _persist(self, direction: str, digest: str, once: Callable[[], Awaitable[T]]) -> T:
        wait_s = _FIRST_WAIT_S
        last: Exception | None = None
        try:
            async with asyncio.timeout(self._timeout_ms / 1000):
                while True:
                    try:
                        result = await once()
                    except (aiohttp.ClientError, OSError, Unavailable) as error:
                        last = error
                        log.info("%s %s: %s; trying again", direction, digest, error)
                        BLOBS.labels(direction, "retried").inc()
                    else:
                        BLOBS.labels(direction, "ok").inc()
                        return result
                    await asyncio.sleep(wait_s * random.uniform(0.5, 1.0))  # noqa: S311
                    wait_s = min(2 * wait_s, _WAIT_S_MAX)
        except TimeoutError:
            BLOBS.labels(direction, "failed").inc()
            reason = str(last) or type(last).__name__ if last else "no answer"
            raise Unavailable(f"{direction} of {digest} failed for {self._timeout_ms} ms: {reason}") from last
        except HiveError as error:
            BLOBS.labels(direction, error.code).inc()
            raise

    async def _get(self, digest: str) -> bytes:
        async with self._gateway.call("GET", _path(digest), _REQUEST_TIMEOUT) as answer:
            await _check(answer, digest)
            data = b"".join([chunk async for chunk in _bounded(answer)])
        if await asyncio.to_thread(digest_of, data) != digest:
            raise Unavailable(f"the gateway sent bytes that do not hash to {digest}")
        return data

    async def _put(self, digest: str, data: bytes) -> None:
        async with self._gateway.call("PUT", _path(digest), _REQUEST_TIMEOUT, data) as answer:
            await _check(answer, digest)


def _path(digest: str) -> str:
    return f"/v1/blobs/{digest}"


async def _bounded(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    size = 0
    async for chunk in answer.content.iter_any():
        size += len(chunk)
        if size > BLOB_BYTES_MAX:
            raise PayloadTooLarge(f"{answer.url.path}: more than {BLOB_BYTES_MAX} bytes")
        yield chunk


async def _check(answer: aiohttp.ClientResponse, digest: str) -> None:
    if answer.status in (200, 201, 204):
        return
    if answer.status == 404:
        raise NotFound(f"the gateway has no blob {digest}")
    said = (await answer.content.read(500)).decode("utf-8", "replace")
    if answer.status == 413:
        raise PayloadTooLarge(f"the gateway does not take {digest}: {said}")
    # Also 401 and 403: the registry may not know a new key yet, and no attempt fails by itself for it.
    raise Unavailable(f"the gateway answered {answer.status} for {digest}: {said}")
