"""Server-sent events, cut from bytes as they come. Source: HTML Living Standard, section 9.2."""

import re
from typing import Final

from hive_common.kernel.errors import PayloadTooLarge

EVENT_BYTES_MAX: Final = 4 << 20
"""The largest event that is waited for: one with the logprobs of many tokens has some hundred KiB."""

DONE: Final = b"data: [DONE]\n\n"

# A carriage return at the end of what is there may be the first half of a line's end.
_LINE_END: Final = rb"(?:\r\n|\n|\r(?=[^\n]))"
_EVENT_END: Final = re.compile(_LINE_END * 2)
_LINES: Final = re.compile(rb"\r\n|\n|\r")


class Events:
    """Cuts a stream into whole events, each with the blank line that ends it.

    Args:
        bytes_max: of one event.
    """

    def __init__(self, bytes_max: int = EVENT_BYTES_MAX) -> None:
        self._bytes_max = bytes_max
        self._rest = b""

    @property
    def rest(self) -> bytes:
        """What has come of an event that is not whole."""
        return self._rest

    def feed(self, data: bytes) -> list[bytes]:
        """Return the events that are whole with `data`, in order. Their bytes and `rest` together are the stream.

        Raises:
            PayloadTooLarge: an event is longer than it may be.
        """
        if self._rest:
            # An end may lie across the border; what was looked at before is not looked at again.
            start = max(0, len(self._rest) - 3)
            data = self._rest + data
        else:
            start = 0
        events = []
        begin = 0
        for end in _EVENT_END.finditer(data, start):
            events.append(data[begin : end.end()])
            begin = end.end()
        self._rest = data[begin:]
        if len(self._rest) > self._bytes_max:
            raise PayloadTooLarge(f"a server-sent event is longer than {self._bytes_max} bytes")
        return events


def data_of(event: bytes) -> bytes | None:
    """Return the data of an event, or None where it has none: a comment that keeps the connection alive."""
    if event.startswith(b"data: ") and event.endswith(b"\n\n") and event.count(b"\n") == 2 and b"\r" not in event:
        return event[6:-2]
    return _field(event, b"data")


def is_done(event: bytes) -> bool:
    """Say whether an event is the one that OpenAI's streams end with."""
    return b"[DONE]" in event and data_of(event) == b"[DONE]"


def _field(event: bytes, name: bytes) -> bytes | None:
    values = []
    for line in _LINES.split(event):
        field, colon, value = line.partition(b":")
        if field == name:
            values.append(value.removeprefix(b" ") if colon else b"")
    return b"\n".join(values) if values else None
