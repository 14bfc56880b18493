"""Processes that check ranges of the log beside this one, for the time of one verification."""

import asyncio
import logging
import os
import signal
import socket
import sys
from asyncio import StreamReader, StreamWriter
from asyncio.subprocess import DEVNULL, Process
from typing import Final, Self

import msgspec
from hive_common.kernel.errors import Unavailable

from hive_audit.range_worker import LENGTH_BYTES, Answer, framed
from hive_audit.ranges import Checked, Range

log = logging.getLogger(__name__)

PROCESSES_MAX: Final = 4
"""Each takes a core, and a connection whose process takes a part of one."""
END_S: Final = 30.0
"""A process ends behind the range that it checks, which takes some hundredths of a second."""

Wire = tuple[StreamReader, StreamWriter]

_decode = msgspec.msgpack.Decoder(Answer).decode


def processes_here() -> int:
    """Return how many processes a verification is given on this machine; with one core none is worth it."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(cores, PROCESSES_MAX) if cores > 1 else 0


class RangeProcesses:
    """Starts processes when entered, and ends them when left.

    Where they cannot be started none of them is ever `ready`, and a warning says why; whoever asks goes on alone.

    Args:
        dsn: how they reach the log.
        count: how many.
    """

    def __init__(self, dsn: str, count: int) -> None:
        self.count = count
        self._dsn = dsn
        self._free: asyncio.Queue[Wire] = asyncio.Queue()
        self._wires: list[Wire] = []
        self._process: Process | None = None
        self._starting: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        pairs = [socket.socketpair() for _ in range(self.count)]
        for ours, _ in pairs:
            self._wires.append(await asyncio.open_connection(sock=ours))
        descriptors = [theirs.fileno() for _, theirs in pairs]
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "hive_audit.range_worker",
                *map(str, descriptors),
                pass_fds=descriptors,
                stdin=DEVNULL,
                stdout=DEVNULL,
                start_new_session=True,  # what stops a terminal's foreground processes must not cut an answer
            )
        except OSError as error:
            log.warning("verifying in one process only: no other can be started: %s", error)
        finally:
            for _, theirs in pairs:
                theirs.close()
        if self._process is not None:
            self._starting = [asyncio.create_task(self._start(wire)) for wire in self._wires]
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._starting:
            task.cancel()
        await asyncio.gather(*self._starting, return_exceptions=True)
        for wire in self._wires:
            wire[1].transport.abort()
        if self._process is None:
            return
        try:
            async with asyncio.timeout(END_S):
                await self._process.wait()
        except TimeoutError:
            os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()

    @property
    def ready(self) -> bool:
        """Say whether one of them waits for a range."""
        return not self._free.empty()

    async def check(self, range_: Range) -> Checked:
        """Let the next free process check a range.

        Raises:
            Unavailable: Postgres cannot be reached, or the process ended.
        """
        wire = await self._free.get()
        answer = await _ask(wire, framed(range_))
        self._free.put_nowait(wire)
        if answer.checked is None:
            raise Unavailable(answer.unavailable)
        return answer.checked

    async def _start(self, wire: Wire) -> None:
        try:
            await _ask(wire, framed(self._dsn))
        except Unavailable as error:
            log.warning("verifying without a process that was to help: %s", error)
        else:
            self._free.put_nowait(wire)


async def _ask(wire: Wire, message: bytes) -> Answer:
    reader, writer = wire
    try:
        writer.write(message)
        await writer.drain()
        length = int.from_bytes(await reader.readexactly(LENGTH_BYTES))
        return _decode(await reader.readexactly(length))
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise Unavailable("a process that verifies the log ended before its time") from error
