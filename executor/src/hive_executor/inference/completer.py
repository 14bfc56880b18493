"""Where calls of this device go: to its own back ends first, then to the router."""

import time
from collections.abc import AsyncGenerator, Sequence
from typing import Final, Protocol

import msgspec
from hive_common.contracts.events import Model
from hive_common.inference.backends import BackEnds
from hive_common.inference.calls import PIN_REGION, Answer, Completer, Head, ModelCall, OfferedModel
from hive_common.kernel.errors import HiveError, InvalidArgument, NotFound, RateLimited, Unavailable

from hive_executor.inference.watched import Watched

LOCAL: Final = "local"
LOOK_AGAIN_S: Final = 1.0
"""A model that nobody knows is looked for on this device again, but not more often than this."""


class Reports(Protocol):
    """Takes down what this device served itself."""

    def begun(self, call: ModelCall) -> Watched:
        """Note that a call begins here; the result sees its answer."""
        ...


class DeviceCompleter:
    """A `Completer` for programs and guests of this device.

    Args:
        executor_id: of this device.
        own: its back ends.
        router: the way to those of others.
        reports: takes down what was served here.
        region: of this device; empty where it is not told.
        counts_only: of no call of this device prompt and completion are kept, here or anywhere.
    """

    def __init__(
        self,
        executor_id: str,
        own: BackEnds,
        router: Completer,
        reports: Reports,
        region: str = "",
        counts_only: bool = False,
    ) -> None:
        self._head = (LOCAL, executor_id)
        self._executor_id = executor_id
        self._own = own
        self._router = router
        self._reports = reports
        self._region = region
        self._counts_only = counts_only
        self._looked_s = 0.0

    async def complete(self, call: ModelCall) -> Answer:
        """Begin a call; see `Completer`."""
        if self._counts_only:
            call = msgspec.structs.replace(call, counts_only=True)
        failure: HiveError | None = None
        if call.metered:
            # Others draw on the same budget, and the router counts it. It may have the call answered here.
            return await self._router.complete(call)
        if self._may_stay(call) and self._own.serving(call.model):
            watched = self._reports.begun(call)
            try:
                return await self._here(watched)
            except BaseException as error:
                if not isinstance(error, HiveError) or not _others_may(error):
                    watched.failed(error)
                    raise
                # From here on the router takes it down.
                failure = error
        try:
            return await self._router.complete(call)
        except (NotFound, Unavailable) as error:
            if failure is not None:
                # What this device says of its own model is nearer than what others lack.
                raise failure from error
            if self._may_stay(call) and await self._has_come(call.model):
                return await self._here(self._reports.begun(call))
            raise

    async def models(self) -> Sequence[Model]:
        """Return what can be called; while the control plane is away, what is on this device."""
        found: dict[str, Model] = {}
        try:
            found = {model.name: model for model in await self._router.models()}
        except HiveError:
            # Own models answer all the same.
            found = {}
        for model in self._own.found:
            others = found.get(model.name)
            executors = others.executors if isinstance(others, OfferedModel) else ()
            here = () if self._executor_id in executors else (self._executor_id,)
            found[model.name] = OfferedModel(**msgspec.structs.asdict(model), executors=(*here, *executors))
        return [found[name] for name in sorted(found)]

    def _may_stay(self, call: ModelCall) -> bool:
        return not call.pin.startswith(PIN_REGION) or call.pin.removeprefix(PIN_REGION) == self._region

    async def _has_come(self, model: str) -> bool:
        if time.monotonic() - self._looked_s < LOOK_AGAIN_S:
            return False
        self._looked_s = time.monotonic()
        await self._own.look()
        return bool(self._own.serving(model))

    async def _here(self, watched: Watched) -> Answer:
        answer = await self._own.complete(watched.call)
        route, executor = self._head
        head = Head(answer.head.status, answer.head.content_type, route, executor)
        return _Answer(head, watched.answered(answer.chunks))


def _others_may(error: HiveError) -> bool:
    """Say whether another device may do better: this one is full, broken, or its model lacks what is needed."""
    lacks = isinstance(error, InvalidArgument) and "need" in error.fields
    return lacks or isinstance(error, Unavailable | RateLimited | NotFound)


class _Answer(msgspec.Struct):
    head: Head
    chunks: AsyncGenerator[bytes, None]
