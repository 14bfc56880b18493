"""A router that is killed in the middle of calls that cost money: no budget is overspent, and nothing is lost."""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.contracts.budgets import SharedBudget
from hive_common.kernel.errors import BudgetExhausted, Unavailable
from hive_common.kernel.ids import new_id
from hive_common.ops.config import ServiceConfig, write_config
from hive_common.rpc.client import call, open_channel
from hive_common.testing.fixtures import NatsServer
from hive_common.testing.scripted import Script, ScriptedBackEnd, ScriptedModel
from hive_proto.models.v1 import models_pb2 as pb

from .conftest import Log, Router
from .test_executor_calls import joined
from .test_money import ask, budget, cost_of, counted, of_types, provider, set_budget
from .test_shared_budgets import Guests

CALLS = 200
BODY = {"max_tokens": 10}


class Process:
    """A router in a process of its own, at the same address after each start."""

    def __init__(self, config: ServiceConfig, folder: Path) -> None:
        self._file = folder / "router.json"
        write_config(self._file, config)
        self._log = folder / "router.log"
        self._address = f"{config.grpc_host}:{config.grpc_port}"
        self._running: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it takes calls. The test's timeout bounds that."""
        command = (sys.executable, "-P", "-m", "hive_router", "--config", str(self._file))
        with self._log.open("ab") as log:
            self._running = await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log, cwd="/")
        async with open_channel(self._address) as channel:
            ready = asyncio.ensure_future(channel.channel_ready())
            ended = asyncio.ensure_future(self._running.wait())
            await asyncio.wait({ready, ended}, return_when=asyncio.FIRST_COMPLETED)
            ready.cancel()
            assert not ended.done(), self._log.read_text()[-2_000:]
            ended.cancel()

    async def end(self, how: signal.Signals) -> None:
        """End it, and wait for that."""
        process, self._running = self._running, None
        if process is not None:
            process.send_signal(how)
            await process.wait()


@pytest.fixture
async def acme() -> AsyncIterator[ScriptedBackEnd]:
    script = Script(models=(ScriptedModel(name="big-1"),), api_key="secret", tokens=10, pace_ms=5)
    async with ScriptedBackEnd(script) as server:
        yield server


@pytest.fixture
async def process(config: ServiceConfig, acme: ScriptedBackEnd, tmp_path: Path) -> AsyncIterator[Process]:
    extra = {"providers": [provider(tmp_path, acme.url)]}
    raw = {name: msgspec.Raw(msgspec.json.encode(value)) for name, value in extra.items()}
    started = Process(msgspec.structs.replace(config, extra=raw), tmp_path)
    yield started
    await started.end(signal.SIGKILL)


async def persistent(router: Router) -> str:
    """Make a call, anew while there is no router, and say how it ended."""
    while True:
        try:
            await ask(router, body=BODY)
        except BudgetExhausted:
            return "refused"
        except Unavailable:
            await asyncio.sleep(0.05)
        else:
            return "answered"


def ended(calls: list[asyncio.Future[str]]) -> set[str]:
    return {call.result() for call in calls if call.done()}


async def returned(router: Router) -> pb.Budget:
    request = pb.ReturnUnaccountedRequest(subject="total", reason="the bill says so", caller="owner-1")
    return await call(router.stub.ReturnUnaccounted(request, metadata=router.key))


def cost_at(back_end: ScriptedBackEnd) -> int:
    """Return what a provider would charge: prompts of one word, and all that was generated."""
    return sum(cost_of(1, one.tokens) for one in back_end.generations)


async def test_killed_in_the_middle_of_two_hundred_calls(
    process: Process, config: ServiceConfig, nats_server: NatsServer, acme: ScriptedBackEnd, log: Log
) -> None:
    await process.start()
    async with open_channel(f"{config.grpc_host}:{config.grpc_port}") as channel:
        router = Router(config, channel, nats_server)
        # A budget for fifty of them, by what each of them can cost at most.
        reservation = cost_of(
            len(b'{"messages":[{"role":"user","content":"count"}],"model":"big-1","max_tokens":10}'), 10
        )
        limit = 50 * reservation
        await set_budget(router, "total", ("month", "usd", limit))
        calls = [asyncio.ensure_future(persistent(router)) for _ in range(CALLS)]
        # Some are answered by then: what is set aside for those under way may be all that is left.
        await acme.until(lambda: len(acme.generations) >= 10 and "answered" in ended(calls))
        await process.end(signal.SIGKILL)
        await acme.until(lambda: all(one.outcome for one in acme.generations))
        await process.start()
        outcomes: list[Any] = await asyncio.gather(*calls)
        assert {*outcomes} == {"answered", "refused"}

        state = (await budget(router)).limits[0]
        # Each call that ended since has its record soon; what the killed router knew of is what has none.
        while True:
            recorded = sum(event.nano_usd for event in await of_types(log, "ModelCallFinished"))
            state = (await budget(router)).limits[0]
            if recorded + state.unaccounted == state.spent:
                break
            await asyncio.sleep(0.05)
        assert recorded <= cost_at(acme) <= state.spent <= limit
        assert state.unaccounted > 0

        # Somebody has looked at the bill.
        state = (await returned(router)).limits[0]
        assert (state.spent, state.unaccounted) == (recorded, 0)
        await process.end(signal.SIGTERM)
    assert await counted(log) == recorded


async def test_a_jobs_tokens_stay_spent_when_the_router_is_killed(
    config: ServiceConfig, nats_server: NatsServer, back_end: ScriptedBackEnd, log: Log, tmp_path: Path
) -> None:
    raw = {"model_urls": msgspec.Raw(msgspec.json.encode([back_end.url]))}
    process, most = Process(msgspec.structs.replace(config, extra=raw), tmp_path), 2_000
    await process.start()
    try:
        async with open_channel(f"{config.grpc_host}:{config.grpc_port}") as channel:
            router = Router(config, channel, nats_server)
            async with router.device(new_id()) as device:
                await joined(router, log, device)
                guests = Guests(router, device, log)
                job = await guests.job({"limits": {"budget": {"tokens": most}}})
                shared = [SharedBudget(f"job:{job}", tokens=most)]
                for _ in range(5):
                    assert await guests.call("scripted", shared, job=job) is None
                # Before their records are written, or after: what is spent is known by what was set aside.
                await process.end(signal.SIGKILL)
                await process.start()
                await guests.until_refused("scripted", shared, job=job)
                answered = len(guests.ids) - 1
                request = pb.JobUsageRequest(job_id=job)
                (state,) = (await call(router.stub.GetJobUsage(request, metadata=router.key))).budget.limits
                assert answered * 16 <= state.spent <= most == state.limit.amount
                assert 0 < state.unaccounted < most
                # Somebody has looked: only what is recorded was spent.
                given_back = pb.ReturnUnaccountedRequest(subject=f"job:{job}", reason="seen", caller="owner-1")
                await call(router.stub.ReturnUnaccounted(given_back, metadata=router.key))
                (state,) = (await call(router.stub.GetJobUsage(request, metadata=router.key))).budget.limits
                assert state.unaccounted == 0
                assert await guests.call("scripted", shared, job=job) is None
    finally:
        await process.end(signal.SIGKILL)
