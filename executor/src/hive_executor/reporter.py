"""Sends outcomes to the scheduler until it has committed them."""

import asyncio
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

import msgspec
from hive_common.contracts.limits import REPORT_BYTES_MAX
from hive_common.contracts.messages import (
    AttemptKey,
    AttemptReport,
    Message,
    ReportReply,
    ReportResult,
    report_subject,
)
from hive_common.kernel.errors import HiveError

from hive_executor.link import Backoff, Link
from hive_executor.metrics import REPORT_DURATION, REPORTS
from hive_executor.spool import Spool

log = logging.getLogger(__name__)

ANSWER_S: Final = 5.0
"""A commit takes milliseconds; one that takes longer than this was most likely lost."""

BATCH_MAX: Final = 500
"""The scheduler takes 1,000 reports at once; this many, with starts and `MARKS_MAX`, are below that."""

MARKS_MAX: Final = 250
"""Reports of how far attempts are that travel at once."""

GATHER_S: Final = 0.02
"""While there is more to do anyway, outcomes of this time share a report, and then a commit."""

_ENVELOPE_BYTES: Final = 1024


class _RawReportRequest(Message, frozen=True, kw_only=True):
    """A `ReportRequest` whose outcomes are sent as they stand on disk."""

    session: str
    reports: tuple[msgspec.Raw, ...]


class Reporter:
    """One report under way at a time; whatever ends meanwhile goes with the next one.

    Args:
        is_busy: whether more outcomes are about to come, so that waiting for them a moment costs nothing.
        on_change: called when outcomes were answered.
        on_late: takes attempts that run here but that the scheduler has given up.
    """

    def __init__(
        self,
        link: Link,
        spool: Spool,
        session: str,
        *,
        is_busy: Callable[[], bool],
        on_change: Callable[[], None],
        on_late: Callable[[Iterable[AttemptKey]], None],
    ) -> None:
        self._link = link
        self._spool = spool
        self._session = session
        self._is_busy = is_busy
        self._on_change = on_change
        self._on_late = on_late
        self._started: dict[AttemptKey, AttemptReport] = {}
        self._progress: dict[AttemptKey, AttemptReport] = {}
        self._wake = asyncio.Event()
        self._reset = asyncio.Event()
        self.was_refused = False
        """Whether the last answer was an error: the scheduler is there, and does not take what it was sent."""
        link.on_reset(self._on_reset)

    def wake(self) -> None:
        """Say that there is an outcome."""
        self._wake.set()

    def started(self, report: AttemptReport) -> None:
        """Say with the next report that an attempt runs. Best effort: it is not kept on disk."""
        self._started[AttemptKey(report.task, report.attempt)] = report
        self._wake.set()

    def progress(self, report: AttemptReport) -> None:
        """Say with the next report how far an attempt is, unless it has come further by then. Best effort too."""
        self._progress[AttemptKey(report.task, report.attempt)] = report
        self._wake.set()

    async def run(self) -> None:
        """Report for ever. Ends only by being cancelled."""
        backoff = Backoff()
        while True:
            await self._wake.wait()
            self._wake.clear()
            while self._spool or self._started or self._progress:
                await self._gather()
                try:
                    await self._report()
                    backoff.reset()
                except HiveError as error:
                    log.info("report: %s", error.message)
                    REPORTS.labels("unanswered").inc()
                    await self._pause(backoff.next_s())

    async def _gather(self) -> None:
        """Let outcomes come together while more are about to come."""
        try:
            async with asyncio.timeout(GATHER_S):
                while self._is_busy():
                    self._wake.clear()
                    await self._wake.wait()
        except TimeoutError:
            pass

    async def flushed(self) -> None:
        """Return when nothing waits to be reported."""
        while self._spool:
            self._wake.set()
            await asyncio.sleep(0.005)

    async def _report(self) -> None:
        batch = self._spool.batch(REPORT_BYTES_MAX - _ENVELOPE_BYTES, BATCH_MAX)
        started, self._started = self._started, {}
        progress = dict(itertools.islice(self._progress.items(), MARKS_MAX))
        for key in progress:
            del self._progress[key]
        running = [*started.items(), *progress.items()]
        bodies = [spooled.body for spooled in batch]
        # A start that travels in front of its own outcome would only be another event.
        bodies += [msgspec.json.encode(report) for key, report in running if key not in self._spool]
        if not bodies:
            return
        body = _RawReportRequest(session=self._session, reports=tuple(map(msgspec.Raw, bodies)))
        begun = time.perf_counter()
        subject = report_subject(self._link.executor_id)
        try:
            reply = await self._link.request(subject, body, ReportReply, ANSWER_S)
            self.was_refused = reply.error is not None
            if reply.error is not None:
                raise reply.error.raised()
        except HiveError:
            self._started = started | self._started
            self._progress = progress | self._progress
            raise
        REPORT_DURATION.observe(time.perf_counter() - begun)
        self._settle(reply.results, {spooled.key for spooled in batch}, {key for key, _ in running})

    def _settle(self, results: Iterable[ReportResult], sent: set[AttemptKey], running: set[AttemptKey]) -> None:
        settled, late = [], []
        for result in results:
            key = AttemptKey(result.task, result.attempt)
            if key in sent:
                settled.append(key)
                REPORTS.labels(result.verdict).inc()
            elif key in running and result.verdict != "accepted":
                late.append(key)
            if result.verdict == "rejected":
                log.error("the scheduler rejected the report on attempt %s-%d", result.task, result.attempt)
        self._spool.settle(settled)
        if late:
            self._on_late(late)
        self._on_change()

    async def _pause(self, wait_s: float) -> None:
        self._reset.clear()
        try:
            async with asyncio.timeout(wait_s):
                await self._reset.wait()
        except TimeoutError:
            pass

    def _on_reset(self) -> None:
        self._reset.set()
        self._wake.set()
