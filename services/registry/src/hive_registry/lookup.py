"""Many lookups by key at the same time become one query."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

V = TypeVar("V")

KEYS_MAX = 1_000
"""Keys in one query."""


class GatheredLookup(Generic[V]):
    """Collects the keys that are asked for while a query runs, and asks for all of them with the next one.

    When a thousand executors reconnect at once, that is a handful of queries instead of a thousand.

    Args:
        fetch: returns what is found for some keys.
    """

    def __init__(self, fetch: Callable[[Sequence[str]], Awaitable[dict[str, V]]]) -> None:
        self._fetch = fetch
        self._waiting: dict[str, asyncio.Future[V | None]] = {}
        self._task: asyncio.Task[None] | None = None

    async def get(self, key: str) -> V | None:
        """Return what is found for `key`, or None. Raises what `fetch` raises."""
        future = self._waiting.get(key)
        if future is None:
            future = self._waiting[key] = asyncio.get_running_loop().create_future()
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._drain(), name="gathered-lookup")
        # Others may wait for the same key; one of them who leaves must not take it away.
        return await asyncio.shield(future)

    async def _drain(self) -> None:
        while self._waiting:
            keys = list(self._waiting)[:KEYS_MAX]
            asked = {key: self._waiting.pop(key) for key in keys}
            try:
                found = await self._fetch(keys)
            except Exception as error:  # noqa: BLE001 - it goes to everyone who asked
                for future in asked.values():
                    future.set_exception(error)
                    # Whoever asked may be gone already.
                    future.exception()
                continue
            for key, future in asked.items():
                future.set_result(found.get(key))
