import asyncio
from collections.abc import Sequence

import pytest
from hive_registry.lookup import GatheredLookup


async def test_lookups_at_the_same_time_share_a_query() -> None:
    queries: list[list[str]] = []
    gate = asyncio.Event()

    async def fetch(keys: Sequence[str]) -> dict[str, int]:
        queries.append(list(keys))
        await gate.wait()
        return {key: int(key) for key in keys if key != "7"}

    lookup = GatheredLookup(fetch)
    first = asyncio.create_task(lookup.get("0"))
    while not queries:
        await asyncio.sleep(0)
    others = [asyncio.create_task(lookup.get(str(number % 10))) for number in range(100)]
    await asyncio.sleep(0)
    gate.set()
    assert await first == 0
    assert await asyncio.gather(*others) == [None if n % 10 == 7 else n % 10 for n in range(100)]
    assert queries == [["0"], [str(n) for n in range(10)]]


async def test_a_failed_query_fails_those_who_asked_and_nobody_after_them() -> None:
    fails = True

    async def fetch(keys: Sequence[str]) -> dict[str, int]:
        if fails:
            raise ConnectionError
        return dict.fromkeys(keys, 1)

    lookup = GatheredLookup(fetch)
    results = await asyncio.gather(lookup.get("a"), lookup.get("b"), return_exceptions=True)
    assert [type(result) for result in results] == [ConnectionError] * 2
    fails = False
    assert await lookup.get("a") == 1


async def test_one_who_leaves_does_not_take_the_answer_from_the_others() -> None:
    gate = asyncio.Event()

    async def fetch(keys: Sequence[str]) -> dict[str, int]:
        await gate.wait()
        return dict.fromkeys(keys, 1)

    lookup = GatheredLookup(fetch)
    leaving, staying = (asyncio.create_task(lookup.get("a")) for _ in range(2))
    await asyncio.sleep(0)
    leaving.cancel()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await leaving
    assert await staying == 1
