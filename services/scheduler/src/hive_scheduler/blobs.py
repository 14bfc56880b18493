"""Blobs that decisions look at: fetched before they are needed, kept while they are, within a bound."""

import logging
from collections import OrderedDict
from typing import Final

from hive_common.artifacts.store import ArtifactStore
from hive_common.contracts import values
from hive_common.contracts.limits import MIB
from hive_common.contracts.values import Value
from hive_common.kernel.errors import Internal, InvalidArgument, NotFound

log = logging.getLogger(__name__)

CACHE_BYTES_MAX: Final = 64 * MIB
STORED_MAX: Final = 10_000
"""Digests that are remembered as stored. Forgetting one only costs a second look at the store."""


class Blobs:
    """Blobs in memory, by digest, least recently used ones dropped first."""

    def __init__(self, store: ArtifactStore) -> None:
        self._store = store
        self._cache: OrderedDict[str, bytes] = OrderedDict()
        self._cache_bytes = 0
        self.stored: set[str] = set()

    async def load(self, digest: str) -> bytes | None:
        """Return a blob, or None where the store has none that is whole. Raises `Unavailable`."""
        data = self._cache.get(digest)
        if data is not None:
            self._cache.move_to_end(digest)
            return data
        try:
            data = await self._store.get(digest)
        except (NotFound, InvalidArgument, Internal) as error:
            if isinstance(error, Internal):
                log.error("%s", error.message)
            return None
        self._keep(digest, data)
        return data

    async def size(self, digest: str) -> int | None:
        """Return a blob's size in bytes, or None where the store has none. Raises `Unavailable`."""
        try:
            return await self._store.size(digest)
        except (NotFound, InvalidArgument):
            return None

    async def put(self, data: bytes) -> str:
        """Store a blob and return its digest. Raises `Unavailable`."""
        digest = await self._store.put(data)
        if len(self.stored) >= STORED_MAX:
            self.stored.clear()
        self.stored.add(digest)
        self._keep(digest, data)
        return digest

    async def value_of(self, data: bytes) -> Value:
        """Return JSON bytes as a value, stored as a blob where they are too large to be inline."""
        if values.fits_inline(data):
            return values.inline(data)
        await self.put(data)
        return values.by_digest(data)

    def _keep(self, digest: str, data: bytes) -> None:
        if digest in self._cache or len(data) > CACHE_BYTES_MAX // 2:
            return
        self._cache[digest] = data
        self._cache_bytes += len(data)
        while self._cache_bytes > CACHE_BYTES_MAX:
            _, dropped = self._cache.popitem(last=False)
            self._cache_bytes -= len(dropped)
