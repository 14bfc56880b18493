"""Bodies as parts of NATS messages, and back again."""

from collections.abc import Iterator
from typing import Final, Protocol

from hive_common.inference.calls import BODY_BYTES_MAX
from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge

PART_BYTES_MAX: Final = 384 * 1024
"""A part is a JSON string inside of a message: quotes and line breaks double there, and 1 MiB is all it has."""

PARTS_MAX: Final = 2 * BODY_BYTES_MAX // PART_BYTES_MAX


class Part(Protocol):
    """A message with one part of a body: `InferRequest`, `ModelCallRequest`."""

    @property
    def body(self) -> str:
        """The text of this part."""
        ...

    @property
    def part(self) -> int:
        """Its number, from 0."""
        ...

    @property
    def parts(self) -> int:
        """How many there are."""
        ...


def parts_of(body: bytes, size: int = PART_BYTES_MAX) -> list[str]:
    """Return UTF-8 as texts of at most `size` bytes each, cut between characters; one at least.

    Raises:
        UnicodeDecodeError: it is not UTF-8.
    """
    return [body.decode()] if len(body) <= size else list(_cut(body, size))


def _cut(body: bytes, size: int) -> Iterator[str]:
    start = 0
    while start < len(body):
        end = min(start + size, len(body))
        # 0b10xxxxxx is inside of a character (RFC 3629).
        while end < len(body) and body[end] & 0xC0 == 0x80:
            end -= 1
        yield body[start:end].decode()
        start = end


class Assembly:
    """A body whose parts come one after the other."""

    def __init__(self) -> None:
        self._texts: list[bytes] = []
        self.size = 0
        """Bytes that have come."""

    def add(self, part: Part) -> bytes | None:
        """Take the next part; return the body once it is whole.

        Raises:
            InvalidArgument: it is not the part that had to come.
            PayloadTooLarge: the body is longer than `BODY_BYTES_MAX`.
        """
        if part.part != len(self._texts) or not part.part < part.parts <= PARTS_MAX:
            raise InvalidArgument(f"part {part.part} of {part.parts} came where {len(self._texts)} was expected")
        text = part.body.encode()
        self.size += len(text)
        if self.size > BODY_BYTES_MAX:
            raise PayloadTooLarge(f"a body has at most {BODY_BYTES_MAX} bytes", limit_bytes=BODY_BYTES_MAX)
        self._texts.append(text)
        return b"".join(self._texts) if len(self._texts) == part.parts else None
