"""Bodies as parts of NATS messages, and back again."""

from collections.abc import Iterator
from typing import Final

PART_BYTES_MAX: Final = 384 * 1024
"""A part is a JSON string inside of a message: quotes and line breaks double there, and 1 MiB is all it has."""


def parts_of(body: bytes, size: int = PART_BYTES_MAX) -> list[str]:
    """Return UTF-8 as texts of at most `size` bytes each, cut between characters; one at least."""
    if len(body) <= size:
        return [body.decode()]
    return list(_cut(body, size))


def _cut(body: bytes, size: int) -> Iterator[str]:
    start = 0
    while start < len(body):
        end = min(start + size, len(body))
        # 0b10xxxxxx is inside of a character (RFC 3629).
        while end < len(body) and body[end] & 0xC0 == 0x80:
            end -= 1
        yield body[start:end].decode()
        start = end
