"""Where an answer ends on the wires that a `TcpProxy` stands in: by then the server has done what it was asked."""

import re
from collections.abc import Iterator

_HEADERS, _RST_STREAM = 1, 3
_END_STREAM = 1
_FRAME_HEAD_BYTES = 9
_POSTGRES_READY = re.compile(rb"Z\x00\x00\x00\x05[ITE]")
_NATS_REPLY = re.compile(rb"(?:^|\r\n)H?MSG _INBOX\.")
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)\r\n", re.IGNORECASE)


def postgres_answered(answer: bytes) -> bool:
    """ReadyForQuery has come, inside of a transaction or not (PostgreSQL protocol, section 54.7)."""
    return _POSTGRES_READY.search(answer) is not None


def nats_answered(answer: bytes) -> bool:
    """A message to an inbox has come (NATS client protocol, MSG and HMSG)."""
    return _NATS_REPLY.search(answer) is not None


def grpc_answered(answer: bytes) -> bool:
    """The trailers of a call, or its reset, have come (RFC 9113, sections 6.2 and 6.4)."""
    return any(kind == _RST_STREAM or (kind == _HEADERS and flags & _END_STREAM) for kind, flags in _frames(answer))


def http_answered(answer: bytes) -> bool:
    """The whole of one response has come (RFC 9112, section 6)."""
    head, found, body = answer.partition(b"\r\n\r\n")
    if not found:
        return False
    length = _LENGTH.search(head + b"\r\n")
    if length is not None:
        return len(body) >= int(length[1])
    return body.endswith(b"0\r\n\r\n") if b"chunked" in head.lower() else head.startswith(b"HTTP/1.1 204")


def _frames(data: bytes) -> Iterator[tuple[int, int]]:
    """Yield type and flags of each whole frame (RFC 9113, section 4.1)."""
    at = 0
    while at + _FRAME_HEAD_BYTES <= len(data):
        length = int.from_bytes(data[at : at + 3], "big")
        kind, flags = data[at + 3], data[at + 4]
        at += _FRAME_HEAD_BYTES + length
        if at > len(data):
            return
        yield kind, flags
