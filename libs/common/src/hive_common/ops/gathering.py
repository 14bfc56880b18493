"""A transport that writes what one turn of the loop has to say in one go.

Each write of a socket is a call of the system, and wakes whoever reads there: twice, and it has read half of it.
"""

import asyncio
from typing import Any, Final

GATHERED_BYTES_MAX: Final = 64 * 1024
"""More than this is written at once: gathering it any longer would only copy it."""


class Gathering(asyncio.Transport):
    """Writes to another transport, once for each turn of the loop.

    Args:
        transport: that really writes.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__()
        self._transport = transport
        self._loop = asyncio.get_running_loop()
        self._parts: list[bytes] = []
        self._size = 0

    def write(self, data: Any) -> None:
        """Write soon; in order."""
        if not self._parts:
            self._loop.call_soon(self.flush)
        self._parts.append(data)
        self._size += len(data)
        if self._size > GATHERED_BYTES_MAX:
            self.flush()

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
        """Close now."""
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
