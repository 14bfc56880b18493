"""Lines of guests while they run, for whoever watches: best effort, in batches.

The whole log goes with the report. So a guest that ends soon sends nothing here, and a line that does not fit is
dropped and counted.
"""

import asyncio
import logging
from typing import Final

import msgspec
import nats.errors
from hive_common.contracts.messages import Assignment, LogBatch, LogLine, log_subject

from hive_executor.link import Link
from hive_executor.metrics import LOG_LINES_DROPPED
from hive_executor.sandbox.model import LogLine as GuestLine

log = logging.getLogger(__name__)

BATCH_S: Final = 0.05
BATCH_BYTES_MAX: Final = 64 << 10


class LiveLog:
    """The lines of one attempt that wait to be sent."""

    def __init__(self, assignment: Assignment) -> None:
        self.assignment = assignment
        self.is_open = False
        self._lines: list[LogLine] = []
        self._bytes = 0

    def write(self, line: GuestLine) -> None:
        """Keep a line, unless too many wait already."""
        self._bytes += len(line.text) + 32
        if self._bytes > BATCH_BYTES_MAX:
            LOG_LINES_DROPPED.inc()
        else:
            self._lines.append(LogLine(line.ts_us, line.level, line.text))

    def take(self) -> tuple[LogLine, ...]:
        """Return what waits, and start anew."""
        lines, self._lines, self._bytes = tuple(self._lines), [], 0
        return lines


class LiveLogs:
    """Sends the lines of all attempts that run long."""

    def __init__(self, link: Link) -> None:
        self._link = link
        self._logs: set[LiveLog] = set()
        self._any_open = asyncio.Event()

    def begin(self, assignment: Assignment) -> LiveLog:
        """Return where the lines of an attempt go. Nothing is sent before `open`."""
        live = LiveLog(assignment)
        self._logs.add(live)
        return live

    def open(self, live: LiveLog) -> None:
        """Send the lines of an attempt from now on, those that came before included."""
        live.is_open = True
        self._any_open.set()

    def end(self, live: LiveLog) -> None:
        """Forget an attempt; what still waits is in its report."""
        self._logs.discard(live)

    async def run(self) -> None:
        """Send what has come every 50 ms. Ends only by being cancelled."""
        while True:
            await self._any_open.wait()
            await asyncio.sleep(BATCH_S)
            is_open = [live for live in self._logs if live.is_open]
            if not is_open:
                self._any_open.clear()
            for live in is_open:
                lines = live.take()
                if lines:
                    await self._send(live.assignment, lines)

    async def _send(self, assignment: Assignment, lines: tuple[LogLine, ...]) -> None:
        if not self._link.is_connected:
            LOG_LINES_DROPPED.inc(len(lines))
            return
        body = LogBatch(job=assignment.job, task=assignment.task, attempt=assignment.attempt, lines=lines)
        subject = log_subject(self._link.executor_id, assignment.task, assignment.attempt)
        try:
            await self._link.client.publish(subject, msgspec.json.encode(body))
        except (nats.errors.Error, OSError) as error:
            log.info("%s: %s", subject, error or type(error).__name__)
            LOG_LINES_DROPPED.inc(len(lines))
