"""What a runner keeps about the guest it runs: its log, its output, and what may end it early."""

import os
import select
import threading
import time
from collections.abc import Callable
from typing import Final

import wasmtime

from hive_executor.sandbox.frames import HostAnswer, receive_stops
from hive_executor.sandbox.model import CANCELLED, LOG_LINE_BYTES_MAX, LOG_LINE_OVERHEAD_BYTES, Level, LogLine

_FLUSH_AFTER_S: Final = 0.05
_FLUSH_BYTES: Final = 32_768
_PARK_AFTER_S: Final = 1.0
_STDERR_TAIL_BYTES: Final = 4_096


class GuestLog:
    """Takes lines from the guest, drops what is over the limit, and sends the rest on in batches."""

    def __init__(self, bytes_max: int, send: Callable[[list[LogLine]], None]) -> None:
        self._left = bytes_max
        self._send = send
        self._lines: list[LogLine] = []
        self._waiting_bytes = 0
        self._sent_at = time.monotonic()
        self._lock = threading.Lock()
        self.truncated = False

    def write(self, level: Level, message: str) -> None:
        """Append a message; its line breaks make it several lines."""
        if self.truncated:
            return
        for text in message.split("\n"):
            self._append(level, text)
        if self._waiting_bytes >= _FLUSH_BYTES or time.monotonic() - self._sent_at >= _FLUSH_AFTER_S:
            self.flush()

    def _append(self, level: Level, text: str) -> None:
        encoded = text.encode()
        while True:
            part, encoded = encoded[:LOG_LINE_BYTES_MAX], encoded[LOG_LINE_BYTES_MAX:]
            cost = len(part) + LOG_LINE_OVERHEAD_BYTES
            if cost > self._left:
                self.truncated = True
                return
            self._left -= cost
            with self._lock:
                self._lines.append(LogLine(time.time_ns() // 1000, level, part.decode("utf-8", "replace")))
                self._waiting_bytes += cost
            if not encoded:
                return

    def flush(self) -> None:
        """Send what waits."""
        with self._lock:
            self._sent_at = time.monotonic()
            if self._lines:
                lines, self._lines, self._waiting_bytes = self._lines, [], 0
                self._send(lines)


class LineStream:
    """Turns what a guest writes to a descriptor into log lines; never keeps more than one line."""

    def __init__(self, log: GuestLog, level: Level) -> None:
        self._log = log
        self._level = level
        self._rest = b""
        self._recent = bytearray()

    @property
    def tail(self) -> str:
        """Return the end of all that was written."""
        return self._recent[-_STDERR_TAIL_BYTES:].decode("utf-8", "replace")

    def write(self, data: bytes) -> int:
        """Take bytes as the guest wrote them; all of them are always taken."""
        self._recent += data
        if len(self._recent) > 2 * _STDERR_TAIL_BYTES:
            del self._recent[:-_STDERR_TAIL_BYTES]
        if self._log.truncated:
            return len(data)
        *lines, rest = (self._rest + data).split(b"\n")
        for line in lines:
            self._log.write(self._level, line.decode("utf-8", "replace").removesuffix("\r"))
        self._rest = rest
        if len(rest) > LOG_LINE_BYTES_MAX:
            self.finish()
        return len(data)

    def finish(self) -> None:
        """Log a last line that did not end."""
        if self._rest:
            self._log.write(self._level, self._rest.decode("utf-8", "replace"))
            self._rest = b""


class Attempt:
    """One run of one guest.

    Attributes:
        number: of the run, by which the parent may end it.
        stopped_by: code of what interrupted it; empty if nothing did.
        refused: what it asked for and must not have; None if nothing.
        is_out: it waits for the host, which sees to the time itself.
        stood_s: so much of its time did not count.
    """

    def __init__(self, number: int, deadline_s: float, log: GuestLog) -> None:
        self.number = number
        self.deadline_s = deadline_s
        self.log = log
        self.stopped_by = ""
        self.refused: HostAnswer | None = None
        self.is_out = False
        self.stood_s = 0.0


class Interrupter:
    """Ends guests through the engine's epoch, at their deadline or at once, and keeps their log flowing.

    One thread per runner. While guests follow each other closely it is neither woken nor joined for each of
    them, because two thread switches would cost as much as a small guest.

    Args:
        stops: a pipe that brings the numbers of runs that the parent wants ended.
    """

    def __init__(self, engine: wasmtime.Engine, stops: int) -> None:
        self._engine = engine
        self._stops = stops
        self._stopped = -1
        self._poller = select.poll()
        self._poller.register(stops, select.POLLIN)
        self._changed = threading.Condition()
        self._attempt: Attempt | None = None
        self._parked = False
        self._ended_at = time.monotonic()
        threading.Thread(target=self._watch, name="interrupter", daemon=True).start()

    def begin(self, attempt: Attempt) -> None:
        """Watch `attempt` from now on; it may be stopped already (`Attempt.stopped_by`)."""
        with self._changed:
            self._attempt = attempt
            self._obey()
            if self._parked:
                self._changed.notify()

    def end(self) -> None:
        """Watch nothing. After this no interruption can reach a later guest."""
        with self._changed:
            self._attempt = None
            self._ended_at = time.monotonic()

    def leave(self) -> None:
        """Let the watched guest wait for the host, whatever the time."""
        with self._changed:
            if self._attempt is not None:
                self._attempt.is_out = True

    def back(self, stood_s: float) -> None:
        """Watch the guest again, `stood_s` of whose time did not count; if its time is up, it goes no further."""
        with self._changed:
            attempt = self._attempt
            if attempt is not None:
                attempt.is_out = False
                attempt.stood_s += stood_s
                attempt.deadline_s += stood_s
                if attempt.deadline_s <= time.monotonic():
                    self._stop("timeout")

    def stop(self, code: str) -> None:
        """Interrupt the watched guest at its next instruction, for the reason `code`."""
        with self._changed:
            self._stop(code)

    def _obey(self) -> None:
        # An attempt that came after the one to be stopped is another one's.
        if self._attempt is not None and self._attempt.number <= self._stopped:
            self._stop(CANCELLED)

    def _take_stops(self) -> None:
        newest = receive_stops(self._stops)
        if newest is None:
            os._exit(0)  # the executor has gone
        with self._changed:
            self._stopped = max(self._stopped, newest)
            self._obey()

    def _stop(self, code: str) -> None:
        if self._attempt is not None and not self._attempt.stopped_by:
            self._attempt.stopped_by = code
            self._engine.increment_epoch()

    def _watch(self) -> None:
        while True:
            with self._changed:
                if self._attempt is None and time.monotonic() - self._ended_at > _PARK_AFTER_S:
                    self._parked = True
                    self._changed.wait()
                    self._parked = False
                attempt, pause_s = self._attempt, _FLUSH_AFTER_S
                if attempt is not None and not attempt.is_out:
                    left_s = attempt.deadline_s - time.monotonic()
                    if left_s <= 0:
                        self._stop("timeout")
                    else:
                        pause_s = min(left_s, pause_s)
            if attempt is not None:
                attempt.log.flush()
            if self._poller.poll(pause_s * 1000):
                self._take_stops()
