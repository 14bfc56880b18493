"""Messages of protobuf on one connection, each after its length: for what is too frequent for gRPC.

A message on a stream of gRPC passes its threads and its event queue on both sides and takes some 500 µs where
processes have slept; here it is one write, and one callback of the loop on the other side.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import Final, Generic, Protocol, TypeVar, cast

from hive_common.kernel.errors import Unavailable
from hive_common.ops.gathering import Gathering
from hive_common.rpc.server import MESSAGE_BYTES_MAX

log = logging.getLogger(__name__)

_LENGTH: Final = 4
_HIGH_WATER_BYTES: Final = 1 << 20
"""Whoever can wait does, from here on."""


class Message(Protocol):
    """A message of protobuf, as far as it is needed here."""

    def SerializeToString(self) -> bytes:
        """Return its bytes."""
        ...


M = TypeVar("M", bound=Message)


class Frames(asyncio.Protocol, Generic[M]):
    """One end of a connection.

    Args:
        parse: makes a message of its bytes; raises what it likes where they are none.
        took: is called with each message that comes. What it raises ends the connection.
        lost: is called once, when the connection has ended.

    Attributes:
        bytes_max: of a message that is taken; a longer one ends the connection.
    """

    def __init__(self, parse: Callable[[bytes], M], took: Callable[[M], None], lost: Callable[[], None]) -> None:
        self._parse = parse
        self._took = took
        self._lost = lost
        self.bytes_max = MESSAGE_BYTES_MAX
        self._transport: Gathering | None = None
        self._rest = bytearray()
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def is_open(self) -> bool:
        """Whether something can be sent."""
        return self._transport is not None and not self._transport.is_closing()

    def send(self, message: Message) -> None:
        """Send a message. After the end of the connection it is lost; `lost` has told that."""
        if self._transport is not None:
            data = message.SerializeToString()
            self._transport.write(len(data).to_bytes(_LENGTH, "big") + data)

    async def drain(self) -> None:
        """Return once the other end has taken most of what was sent.

        Raises:
            Unavailable: the connection has ended.
        """
        if not self._writable.is_set():
            await self._writable.wait()
        if not self.is_open:
            raise Unavailable("the connection has ended")

    def close(self) -> None:
        """End the connection, once what was sent has gone."""
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """End the connection now."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember the transport."""
        self._transport = Gathering(cast(asyncio.Transport, transport))  # uvloop's does not derive from it
        self._transport.set_write_buffer_limits(_HIGH_WATER_BYTES)

    def data_received(self, data: bytes) -> None:
        """Cut messages."""
        if self._rest:
            self._rest += data
            data = bytes(self._rest) if self._is_whole() else b""
            if not data:
                return
            self._rest.clear()
        at, end = 0, len(data)
        try:
            while at + _LENGTH <= end:
                start = at + _LENGTH
                size = int.from_bytes(data[at:start], "big")
                if size > self.bytes_max:
                    raise ValueError(f"a message of {size} bytes; at most {self.bytes_max} are taken")
                if start + size > end:
                    break
                at = start + size
                self._took(self._parse(data[start:at]))
        except Exception:
            log.exception("a message that cannot be taken: the connection ends")
            self.abort()
            return
        if at < end:
            self._rest += data[at:]

    def _is_whole(self) -> bool:
        """Whether a message is there as a whole: what is long is not copied again for each piece of it."""
        size = int.from_bytes(self._rest[:_LENGTH], "big")
        return len(self._rest) >= _LENGTH + size or size > self.bytes_max

    def pause_writing(self) -> None:
        """Let those that can wait do so."""
        self._writable.clear()

    def resume_writing(self) -> None:
        """Let them go on."""
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        """Tell, and let go whoever waits."""
        self._transport = None
        self._writable.set()
        self._lost()
