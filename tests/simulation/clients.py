"""Clients that submit jobs, ask for their end, and do not give up before they have an answer."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from hive_common.kernel.errors import HiveError, InvalidArgument, Unavailable
from hive_scheduler.leader import Leader

from .jobs import Draft
from .loop import Process
from .scheduler import SchedulerNode

if TYPE_CHECKING:
    from .world import World

PATIENCE_S = 8.0


class Client:
    """Somebody with jobs to do."""

    def __init__(self, world: "World", rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self._process = Process(world.loop, "client")
        self.submitted: set[str] = set()
        self.waiting = 0

    def plan(self, at_s: float, draft: Draft) -> None:
        """Submit a job at a time."""
        self.waiting += 1
        self._world.loop.call_at(at_s, self._begin, draft, context=self._process.context)

    def _begin(self, draft: Draft) -> None:
        self._process.spawn(self._one(draft))

    async def _one(self, draft: Draft) -> None:
        oracle = self._world.oracle
        try:
            answer = await self._insist(
                lambda leader: leader.submissions.submit(draft.submission), oracle.submitted
            )
        except InvalidArgument as error:
            # Of a list in the document, whose length is known at submit; or there are too few machines.
            if error.fields["path"] != "limits.fan_out" and not draft.impossible:
                oracle.found(f"a job was refused: {error.message}")
            self.waiting -= 1
            return
        job, position, _ = answer
        if draft.impossible:
            oracle.found(f"job {job[-6:]} was taken, and there are too few machines for it")
        self.submitted.add(job)
        self._world.trace("client", f"submitted {job[-6:]} at {position}")
        if draft.cancel_after_s is not None:
            await asyncio.sleep(draft.cancel_after_s)
            await self._insist(
                lambda leader: leader.submissions.cancel(job, "enough", "client"), lambda _: oracle.cancelled(job)
            )
            self._world.trace("client", f"cancelled {job[-6:]}")
        self.waiting -= 1

    async def _insist(self, call: Callable[[Leader], Awaitable[Any]], committed: Callable[[Any], None]) -> Any:
        while True:
            for node in self._rng.sample(self._world.schedulers, len(self._world.schedulers)):
                try:
                    return await self._ask(node, call, committed)
                except (Unavailable, TimeoutError):
                    continue
            await asyncio.sleep(self._rng.uniform(0.1, 1.0))

    async def _ask(
        self, node: SchedulerNode, call: Callable[[Leader], Awaitable[Any]], committed: Callable[[Any], None]
    ) -> Any:
        """Ask one scheduler; the way there and the way back may lose what is said."""
        loop, rng, weather = self._world.loop, self._rng, self._world.bus.weather
        answer: asyncio.Future[Any] = loop.create_future()
        lost_there, lost_back = rng.random() < weather.drop, rng.random() < weather.drop

        def give(value: Any, error: HiveError | None) -> None:
            if answer.done():
                return
            if error is None:
                answer.set_result(value)
            else:
                answer.set_exception(error)

        async def serve() -> None:
            value, error = None, None
            try:
                value = await node.serve(call)
                committed(value)
            except HiveError as failure:
                error = failure
            if not lost_back:
                loop.call_later(rng.uniform(0.001, 0.05), give, value, error, context=self._process.context)

        if not lost_there:
            loop.call_later(rng.uniform(0.001, 0.05), lambda: node.process.spawn(serve()), context=loop.world)
        async with asyncio.timeout(PATIENCE_S):
            return await answer
