"""One call on its way: what is known of it so far, for the waterfall, its record and its explanation."""

import asyncio
import contextlib
import time
from collections.abc import Callable
from typing import Any, Final

import msgspec
from hive_common.contracts.events import ModelCallFinished, ModelCandidate
from hive_common.inference.calls import Head, ModelCall
from hive_common.inference.tally import Tally
from hive_common.kernel.errors import HiveError

from hive_router.bodies import Prepared
from hive_router.cloud import Passage
from hive_router.domain.budgets import NOTHING
from hive_router.domain.selection import Ask, BackEnd
from hive_router.paying import Reserved
from hive_router.response_cache import Asking

CANCELLED: Final = "cancelled"
"""Outcome of a call whose caller went away."""


class Flight:
    """A call from its coming to its record.

    Args:
        call: what was asked.
        body: as back ends get it.
        owner: whose call it is.
        subject: pseudonym of whose data it is, for the envelope.
        actor: who made it, for the envelope.

    Attributes:
        until: when its time is up, on the loop's clock.
        ask: what selection looks at; `tried` grows.
        tally: of the answer that goes to the caller.
        code: empty while it runs and where it succeeded, else of the error that ended it.
        streamed: its answer is a stream.
        finished: it has ended.
        timer: until its answer begins.
        on_stop: from there on: ends its stream.
        stopped: why it may not go on, where that is so.
        passage: whether it may go to providers, and whose budgets it counts against; None: none serve its model.
        core: where it went last is a provider, or a device of tier `core`.
        cost: what it has cost, so far; `estimated` where that is partly what was reserved.
        hold: what is reserved for the try that runs.
        head: of its answer, once that begins.
        asking: what the cache is asked for, and is told where its answer may be kept; None: it may not.
    """

    __slots__ = (
        "_candidates",
        "_kept_bytes",
        "_tried",
        "actor",
        "ask",
        "asking",
        "block",
        "body",
        "call",
        "code",
        "core",
        "cost",
        "ended_us",
        "estimated",
        "executor",
        "finished",
        "first_byte_ms",
        "head",
        "hold",
        "on_stop",
        "owner",
        "passage",
        "provider",
        "route",
        "start",
        "stopped",
        "streamed",
        "subject",
        "tally",
        "timer",
        "until",
        "wall_ms",
    )

    def __init__(self, call: ModelCall, body: Prepared, *, owner: str, subject: str, actor: str) -> None:
        self.call = call
        self.body: Prepared | None = body
        self.owner = owner
        self.subject = subject
        self.actor = actor
        self.start = time.perf_counter()
        self.until = asyncio.get_running_loop().time() + call.deadline_ms / 1000
        self.ask = Ask(
            model=call.model,
            endpoint=call.endpoint,
            pin=call.pin,
            owner=owner,
            origin=call.origin,
            prompt_bytes=body.prompt_bytes,
            needs=body.needs,
            metered=call.metered,
        )
        self.timer: asyncio.Timeout | None = None
        self.on_stop: Callable[[], None] | None = None
        self.stopped: HiveError | None = None
        self.tally = Tally(not call.counts_only, body.drop_usage)
        self.route = self.executor = self.code = self.provider = self.block = ""
        self.passage: Passage | None = None
        self.hold: Reserved | None = None
        self.head: Head | None = None
        self.asking: Asking | None = None
        self.cost = NOTHING
        self.estimated = self.core = False
        self.first_byte_ms = self.wall_ms = self.ended_us = 0
        self.finished = self.streamed = False
        self._kept_bytes = 0
        self._candidates: list[ModelCandidate] = []
        self._tried: list[ModelCandidate] = []

    def allowed(self, passage: Passage) -> None:
        """Remember whether it may go to providers."""
        self.passage = passage
        self.ask = msgspec.structs.replace(self.ask, cloud_refusal=passage.refusal)

    def timed(self) -> asyncio.Timeout:
        """Return what bounds the time until its answer begins."""
        self.timer = asyncio.timeout_at(self.until)
        return self.timer

    def stop(self, error: HiveError) -> None:
        """End it now, as if its time were up, with this error."""
        self.stopped = error
        self.until = asyncio.get_running_loop().time()
        if self.on_stop is not None:
            self.on_stop()
        elif self.timer is not None:
            # It may be over: an answer that is whole is there, and goes as it is.
            with contextlib.suppress(RuntimeError):
                self.timer.reschedule(self.until)

    def left_ms(self) -> int:
        """Return what is left of the call's time."""
        return max(1, int((self.until - asyncio.get_running_loop().time()) * 1000))

    def looked_at(self, candidates: list[ModelCandidate]) -> None:
        """Remember the last selection."""
        self._candidates = candidates

    def going_to(self, backend: BackEnd, route: str) -> None:
        """Remember where the call goes."""
        self.route, self.executor, self.provider = route, backend.executor, backend.provider
        self.core = backend.core

    def paid(self) -> None:
        """Add what the try that has ended cost, if it was one that costs anything."""
        if self.hold is not None:
            self.cost = self.cost.plus(self.hold.cost)
            self.estimated |= self.hold.estimated
            self.block = self.hold.block
            self.hold = None

    def came_of_it(self, backend: BackEnd, what: str) -> None:
        """Remember what came of trying a back end; it is not tried again."""
        for one in self._candidates:
            if one.backend == backend.id:
                self._tried.append(msgspec.structs.replace(one, tried=what))
                break
        self.ask = msgspec.structs.replace(self.ask, tried=self.ask.tried | {backend.id})

    def first_byte(self) -> float:
        """Note that the answer begins, and return the seconds since the call came."""
        passed = time.perf_counter() - self.start
        self.first_byte_ms = round(passed * 1000)
        return passed

    def end(self, code: str) -> None:
        """Note the end."""
        self.code = code
        self.wall_ms = round((time.perf_counter() - self.start) * 1000)
        self.ended_us = time.time_ns() // 1000
        self.finished = True
        self._kept_bytes = 0 if self.call.counts_only else len(self.call.body) + self.tally.kept_bytes
        # Only what came is kept for the record; what went to back ends is not needed any more.
        self.body = None

    @property
    def kept_bytes(self) -> int:
        """What its bodies take while it waits for the log."""
        return self._kept_bytes

    def forget_bytes(self) -> None:
        """Let go of its bodies; what it was remains."""
        self.call = msgspec.structs.replace(self.call, body=b"")
        self.tally.forget()

    def candidates(self) -> tuple[ModelCandidate, ...]:
        """Return what was looked at: what was tried, in order, then the rest."""
        tried = {one.backend for one in self._tried}
        return (*self._tried, *(one for one in self._candidates if one.backend not in tried or not one.backend))

    def event(self, **values: Any) -> ModelCallFinished:
        """Return what the log gets. `values`: request and response, where they are kept."""
        call = self.call
        return ModelCallFinished(
            endpoint=call.endpoint,
            model=call.model,
            key=call.key or (self.passage.key if self.passage else ""),
            route=self.route,
            executor=self.executor,
            code=self.code,
            prompt_tokens=self.tally.prompt_tokens,
            completion_tokens=self.tally.completion_tokens,
            wall_ms=self.wall_ms,
            first_byte_ms=self.first_byte_ms,
            pin=call.pin,
            job=call.job,
            task=call.task,
            attempt=call.attempt,
            candidates=self.candidates(),
            provider=self.provider,
            agent=call.agent.partition("@")[0],
            nano_usd=self.cost.nano_usd,
            estimated=self.estimated,
            block=self.block,
            core=self.core and not self.code,
            **values,
        )
