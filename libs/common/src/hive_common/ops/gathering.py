"""Transports that write in one go what is said at once.

Each write of a socket is a call of the system, and wakes whoever reads there: twice, and it has read half. But
what waits for the rest of its turn of the loop keeps others waiting who could work on it meanwhile.
"""

import asyncio
import time
from typing import Any, Final

GATHERED_BYTES_MAX: Final = 64 * 1024
"""More than this is written at once: gathering it any longer would only copy it."""

GATHER_S: Final = 50e-6


class Gathering(asyncio.Transport):
    """Writes to another transport: at once, and then no more often than each 50 µs, and with each turn of the loop.

    Args:
        transport: that really writes.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._size = 0
        self._written_s = 0.0

    def write(self, data: Any) -> None:
        """Write at once or soon; in order."""
        self._parts.append(data)
        self._size += len(data)
        if self._size > GATHERED_BYTES_MAX or time.perf_counter() - self._written_s > GATHER_S:
            self.flush()
            self._written_s = time.perf_counter()
        elif len(self._parts) == 1:
            self._loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what there is now."""
        if self._parts:
            parts, self._parts, self._size = self._parts, [], 0
            self._transport.write(parts[0] if len(parts) == 1 else b"".join(parts))

    def close(self) -> None:
        """Close once all of it has gone."""
        self.flush()
        self._transport.close()

    def abort(self) -> None:
        """Close now; what is gathered is lost."""
        self._parts, self._size = [], 0
        self._transport.abort()

    def is_closing(self) -> bool:
        """As of the transport."""
        return self._transport.is_closing()

    def get_extra_info(self, name: str, default: Any = None) -> Any:
        """As of the transport."""
        return self._transport.get_extra_info(name, default)

    def pause_reading(self) -> None:
        """As of the transport."""
        self._transport.pause_reading()

    def resume_reading(self) -> None:
        """As of the transport."""
        self._transport.resume_reading()

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """As of the transport."""
        self._transport.set_write_buffer_limits(high, low)

    def get_write_buffer_size(self) -> int:
        """As of the transport, with what is gathered."""
        return self._transport.get_write_buffer_size() + self._size


class HeadHeld(Gathering):
    """Writes at once, but for the head of an answer, which goes with what follows in the same turn of the loop."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._head_is_next = False

    def expect_head(self) -> None:
        """Say that the next thing that is written is a head."""
        self._head_is_next = True

    def write(self, data: Any) -> None:
        """Write at once, or with the next."""
        self._parts.append(data)
        if self._head_is_next:
            self._head_is_next = False
            self._loop.call_soon(self.flush)
        else:
            self.flush()
