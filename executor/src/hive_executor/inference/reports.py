"""Calls that this device served itself, told to the router so that they stand in the log."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

import msgspec
from hive_common.contracts.messages import Committed, ModelCallReport, call_subject
from hive_common.contracts.values import Value, by_digest, fits_inline, inline
from hive_common.inference.calls import ModelCall
from hive_common.inference.completions import assembled
from hive_common.kernel.errors import HiveError

from hive_executor.inference.watched import Finished, Watched
from hive_executor.link import Backoff, Link
from hive_executor.metrics import MODEL_REPORTS, MODEL_REPORTS_WAITING

log = logging.getLogger(__name__)

REPORTS_MAX: Final = 10_000
REPORTS_BYTES_MAX: Final = 64 << 20
"""While the control plane is away; the oldest go first then."""

ANSWER_S: Final = 5.0
AT_ONCE: Final = 16
FLUSH_S: Final = 2.0
SUBJECT: Final = "model-done"


class CallReports:
    """Takes down finished calls, and tells them until the router has committed them.

    Args:
        link: to the control plane.
        store: keeps what is too long for a message.
    """

    def __init__(self, link: Link, store: Callable[[bytes], Awaitable[str]]) -> None:
        self._link = link
        self._store = store
        self._subject = call_subject(link.executor_id, SUBJECT)
        self._waiting: deque[Finished] = deque()
        self._bytes = self._telling = 0
        self._work = asyncio.Event()

    @property
    def waiting(self) -> int:
        """Reports that are not settled."""
        return len(self._waiting) + self._telling

    def begun(self, call: ModelCall) -> Watched:
        """Note that a call begins here; the result sees its answer."""
        return Watched(call, self.take)

    def take(self, finished: Finished) -> None:
        """Take a call that has ended. Returns at once."""
        self._waiting.append(finished)
        self._bytes += finished.kept_bytes
        while len(self._waiting) > REPORTS_MAX or self._bytes > REPORTS_BYTES_MAX:
            self._bytes -= self._waiting.popleft().kept_bytes
            MODEL_REPORTS.labels("dropped").inc()
        MODEL_REPORTS_WAITING.set(len(self._waiting))
        self._work.set()

    async def run(self) -> None:
        """Tell for ever. Ends only by being cancelled."""
        backoff = Backoff(max_s=5.0)
        while True:
            await self._work.wait()
            self._work.clear()
            while self._waiting:
                if await self._tell():
                    backoff.reset()
                else:
                    await asyncio.sleep(backoff.next_s())

    async def flush(self) -> None:
        """Tell what waits, if the router answers soon."""
        try:
            async with asyncio.timeout(FLUSH_S):
                while self._waiting and await self._tell():
                    pass
        except TimeoutError:
            pass
        if self._waiting:
            log.warning("%d calls that this device served were not reported", len(self._waiting))

    async def _tell(self) -> bool:
        """Tell some of what waits; return whether all of that is settled."""
        batch = [self._waiting.popleft() for _ in range(min(AT_ONCE, len(self._waiting)))]
        settled = [False] * len(batch)
        self._telling = len(batch)

        async def tell(at: int) -> None:
            settled[at] = await self._settled(batch[at])

        try:
            async with asyncio.TaskGroup() as group:
                for at in range(len(batch)):
                    group.create_task(tell(at))
        finally:
            again = [report for report, is_settled in zip(batch, settled, strict=True) if not is_settled]
            self._waiting.extendleft(reversed(again))
            self._telling = 0
            self._bytes -= sum(one.kept_bytes for one, is_settled in zip(batch, settled, strict=True) if is_settled)
            MODEL_REPORTS_WAITING.set(len(self._waiting))
        return not again

    async def _settled(self, finished: Finished) -> bool:
        report = finished.report
        try:
            report = await self._with_values(finished)
            answer = await self._link.request(self._subject, report, Committed, ANSWER_S)
            if answer.error is not None:
                raise answer.error.raised()
        except HiveError as error:
            if error.retryable:
                log.debug("call %s: %s", report.call, error.message)
                return False
            # It will never be taken: one bad report must not keep the others.
            log.warning("call %s is not recorded: %s", report.call, error.message)
            MODEL_REPORTS.labels("refused").inc()
            return True
        MODEL_REPORTS.labels("committed").inc()
        return True

    async def _with_values(self, finished: Finished) -> ModelCallReport:
        response = finished.response
        if response and finished.is_stream:
            response = await asyncio.to_thread(assembled, response)
        return msgspec.structs.replace(
            finished.report, request=await self._value(finished.request), response=await self._value(response)
        )

    async def _value(self, data: bytes) -> Value | None:
        """Return JSON as a value; what is none, such as a body that the back end refused, is left out."""
        try:
            msgspec.json.decode(data, type=msgspec.Raw)
        except msgspec.DecodeError:
            return None
        if fits_inline(data):
            return inline(data)
        await self._store(data)
        return by_digest(data)
