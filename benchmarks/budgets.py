"""What a budget adds to a call that costs money: reserving before it, settling after it, with blocks in a real log.

`python -m benchmarks.budgets` prints milliseconds; beside them a durable append for each call, which blocks spare.
"""

import asyncio
import json
import statistics
import time
from collections.abc import Awaitable, Callable
from decimal import Decimal
from typing import Any

from hive_common.contracts.events import BudgetLimit
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.inference.calls import ModelCall
from hive_common.inference.providers import ProviderModel
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.ids import new_id
from hive_common.kernel.money import NANO_PER_USD
from hive_router.domain.budgets import Account
from hive_router.providers import bounded
from hive_router.treasury import Treasury

from benchmarks.rounds import spread
from benchmarks.scratch import scratch_log

ROUNDS = 10
CALLS_PER_ROUND = 1_000
AT_ONCE = 64
SUBJECTS = ("total", "key:ci", f"job:{new_id()}", "agent:summarise")
MODEL = ProviderModel(name="m", input_usd=Decimal(3), output_usd=Decimal(15), context_tokens=128_000)
PROMPT = [{"role": "user", "content": "word " * 400}]
BODY = json.dumps({"model": "m", "max_tokens": 500, "messages": PROMPT}).encode()


async def _round(make: Callable[[], Awaitable[float]]) -> list[float]:
    """Return the milliseconds of each call, `AT_ONCE` of which are under way."""
    left = iter(range(CALLS_PER_ROUND))
    samples: list[float] = []

    async def caller() -> None:
        for _ in left:
            samples.append(await make() * 1000)
            await asyncio.sleep(0)

    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    return samples


async def run(dsn: str) -> dict[str, Any]:
    """Measure on this machine, now."""
    async with await LogWriter.open(dsn) as writer:

        async def load(subject: str) -> Account:
            return Account(subject)

        treasury = Treasury(writer, load, SystemClock(), owner="o", ns="default")
        for subject in SUBJECTS:
            limit = BudgetLimit("month", "usd", 10**6 * NANO_PER_USD)
            await treasury.set(subject, [limit], clear=True, actor="bench")
        call = ModelCall(id=new_id(), endpoint="chat", model="m", body=BODY, stream=False, deadline_ms=1_000)

        price = MODEL.price

        async def reserve() -> float:
            started = time.perf_counter()
            going = bounded(call, MODEL, price)
            hold = await treasury.hold(SUBJECTS, going.need)
            reserved = time.perf_counter()
            await asyncio.sleep(0)
            settled = time.perf_counter()
            hold.settle(going.cost(400, 300))
            return reserved - started + time.perf_counter() - settled

        async def append() -> float:
            started = time.perf_counter()
            event = NewEvent(new_id(), 1, "BudgetReserved", 1, b"{}", 1, "bench", "o")
            await writer.append(Append((event,)))
            return time.perf_counter() - started

        found: dict[str, list[float]] = {}
        for _ in range(ROUNDS):
            for name, make in (("reserve_and_settle", reserve), ("append_each", append)):
                samples = sorted(await _round(make))
                found.setdefault(f"{name}_p50_ms", []).append(statistics.median(samples))
                found.setdefault(f"{name}_p99_ms", []).append(samples[len(samples) * 99 // 100])
        await treasury.close()
    return {"calls_per_round": CALLS_PER_ROUND, "at_once": AT_ONCE} | {
        name: spread(values) for name, values in found.items()
    }


async def _main() -> None:
    async with scratch_log() as dsn:
        print(json.dumps(await run(dsn), indent=2))


if __name__ == "__main__":
    asyncio.run(_main())
