"""Several back ends as one."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

from hive_common.contracts.events import Model
from hive_common.inference.backend import CALLS_MAX, BackEnd
from hive_common.inference.calls import Answer, ModelCall
from hive_common.inference.config import BackEndConfig
from hive_common.inference.names import unknown_model
from hive_common.kernel.errors import HiveError, NotFound, RateLimited, Unavailable

log = logging.getLogger(__name__)

LOOK_AGAIN_S: Final = 1.0
"""A call for a model that is not known has it looked for again, but not more often than this."""


class BackEnds:
    """Several back ends as one `Completer`; the first that has a model serves it, the next where that fails.

    async with BackEnds(urls) as back_ends: ...

    Args:
        back_ends: base URLs, or configurations with a key.
        calls_max: calls that may run at each of them at once.
        looks: asks them what they serve; else whoever opens this sets their `found`.

    Raises:
        InvalidArgument: a URL, a key or the file of a CA cannot be used.
    """

    def __init__(
        self, back_ends: Iterable[str | BackEndConfig], calls_max: int = CALLS_MAX, *, looks: bool = True
    ) -> None:
        self._looks = looks
        self._configs = [one if isinstance(one, BackEndConfig) else BackEndConfig(one) for one in back_ends]
        self._calls_max = calls_max
        self._looking: asyncio.Task[tuple[Model, ...]] | None = None
        self._looked_s = 0.0
        self.all: tuple[BackEnd, ...] = ()
        """In the order of the configuration, once opened."""

    async def open(self) -> None:
        """Read the keys, and look at what is there."""
        self.all = tuple(BackEnd(config, self._calls_max) for config in self._configs)
        if self._looks:
            await self.look()

    async def close(self) -> None:
        """Close all connections."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        for one in self.all:
            one.close()

    async def __aenter__(self) -> "BackEnds":
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def run(self, interval_ms: int, on_change: Callable[[], None] = lambda: None) -> None:
        """Look again and again, and call `on_change` when something is different. Ends only by being cancelled."""
        while True:
            await asyncio.sleep(interval_ms / 1000)
            before = self.found
            if await self.look() != before:
                on_change()

    async def look(self) -> tuple[Model, ...]:
        """Look at what all of them serve now, and return each model once, in order of name."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        # Whoever waits may go; the others still want to know.
        return await asyncio.shield(self._looking)

    async def _look(self) -> tuple[Model, ...]:
        await asyncio.gather(*(one.look() for one in self.all))
        self._looked_s = time.monotonic()
        return self.found

    @property
    def found(self) -> tuple[Model, ...]:
        """What was found when they were last looked at, each model once, in order of name."""
        by_name = {model.name: model for one in reversed(self.all) for model in one.found}
        return tuple(by_name[name] for name in sorted(by_name))

    def serving(self, name: str) -> list[BackEnd]:
        """Return those that have a model, in order."""
        return [one for one in self.all if one.model(name) is not None]

    async def models(self) -> tuple[Model, ...]:
        """Return what was found when they were last looked at."""
        return self.found

    async def complete(self, call: ModelCall) -> Answer:
        """Begin a call; see `Completer`."""
        serving = self.serving(call.model)
        if not serving and time.monotonic() - self._looked_s > LOOK_AGAIN_S:
            await self.look()
            serving = self.serving(call.model)
        if not serving:
            raise unknown_model(call.model, (model.name for model in self.found))
        failure: HiveError | None = None
        for one in serving:
            try:
                return await one.complete(call)
            except (Unavailable, RateLimited, NotFound) as error:
                log.info("%s", error.message)
                failure = failure or error
        assert failure is not None
        raise failure
