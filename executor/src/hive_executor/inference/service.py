"""Everything about models that one executor has."""

from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Final

from hive_common.contracts.events import Model
from hive_common.inference.backends import BackEnds
from hive_common.inference.discovery import MODELS_MAX

from hive_executor.config import ExecutorConfig
from hive_executor.inference.asking import RouterWay
from hive_executor.inference.completer import DeviceCompleter
from hive_executor.inference.reports import CallReports
from hive_executor.inference.serving import LoopbackPort
from hive_executor.inference.taking import Taker
from hive_executor.link import Link

LOOK_MS: Final = 5_000
"""A model that somebody has just pulled, or whose server was stopped, is noticed within this time."""


class DeviceModels:
    """Finds the models of this device, serves them to the pool, and is the way to all others.

    Args:
        config: of the executor.
        link: to the control plane; not opened yet.
        store: keeps what is too long for a message.
    """

    def __init__(self, config: ExecutorConfig, link: Link, store: Callable[[bytes], Awaitable[str]]) -> None:
        self._back_ends = BackEnds(config.model_urls)
        self._way = RouterWay(link)
        self._reports = CallReports(link, store)
        self._taker = Taker(link, self._back_ends, config.model_calls_max)
        self.completer = DeviceCompleter(
            config.executor_id,
            self._back_ends,
            self._way,
            self._reports,
            region=config.labels.get("region", ""),
            counts_only=config.models_counts_only,
        )
        """Serves guests and programs of this device."""
        self._port = LoopbackPort(self.completer, config.owner, config.models_port) if config.models_port else None

    async def open(self) -> None:
        """Look for models. Raises InvalidArgument where a key of a back end cannot be read."""
        await self._back_ends.open()

    async def connect(self) -> None:
        """Take calls of the pool, once the link is open."""
        await self._way.open()
        await self._taker.open()

    def run(self, start: Callable[[str, Coroutine[Any, Any, None]], None], on_change: Callable[[], None]) -> None:
        """Start what works without the control plane too.

        Args:
            start: starts one task, by its name.
            on_change: is called when a model came, went, or was loaded.
        """
        start("models watch", self._back_ends.run(LOOK_MS, on_change))
        start("model call reports", self._reports.run())
        start("model calls watch", self._way.run())
        if self._port is not None:
            start("models port", self._port.run())

    def refuse(self, reason: str) -> None:
        """Serve no call of the pool from now on, and end those that run; an empty reason: serve them again."""
        self._taker.refuse(reason)

    async def disconnect(self) -> None:
        """End calls of the pool, and tell what ended."""
        await self._taker.close()
        await self._reports.flush()

    async def close(self) -> None:
        """Let go of the back ends."""
        await self._back_ends.close()

    @property
    def found(self) -> tuple[Model, ...]:
        """What the back ends served when they were last looked at."""
        return self._back_ends.found[:MODELS_MAX]

    @property
    def reports_waiting(self) -> int:
        """How many calls that were served here are not in the log yet."""
        return self._reports.waiting

    def problem(self) -> str | None:
        """Return what is wrong with the loopback port, or None."""
        return None if self._port is None else self._port.problem
