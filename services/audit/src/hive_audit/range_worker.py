"""Processes that check ranges of the log: `python -m hive_audit.range_worker FD…`, one for each open socket FD.

A process is told a connection string first, then ranges, and answers each with what it found. Messages are
MessagePack behind their length in four bytes. It ends when its socket is closed; the first one, which the others
were forked from, after them. Starting an interpreter costs as much as checking 50,000 events, so only one is.
"""

import gc
import os
import socket
import sys
from collections.abc import Sequence
from typing import Any, BinaryIO, Final

import msgspec
import psycopg

from hive_audit.log_source import EVENT_AT, LARGE_BYTES, PAGE, PAGE_BY_SIZE, PAGE_BYTES, PAGE_ROWS, SESSION
from hive_audit.ranges import DOES_NOT_HOLD, Checked, Range, RangeCheck

LENGTH_BYTES: Final = 4


class Answer(msgspec.Struct, frozen=True, array_like=True):
    """What comes back for a range; `unavailable` says why Postgres could not be asked."""

    checked: Checked | None = None
    unavailable: str = ""


_encode = msgspec.msgpack.Encoder().encode
_decode_dsn = msgspec.msgpack.Decoder(str).decode
_decode_range = msgspec.msgpack.Decoder(Range).decode


def framed(message: Any) -> bytes:
    """Return a message as it goes over the pipe."""
    data = _encode(message)
    return len(data).to_bytes(LENGTH_BYTES) + data


def main(descriptors: Sequence[int]) -> None:
    """Serve each of the sockets in a process of its own, until they are closed."""
    # Rows make no cycles, and there are millions of them.
    gc.disable()
    gc.freeze()
    mine, *others = descriptors
    for other in others:
        if os.fork() == 0:
            for descriptor in descriptors:
                if descriptor != other:
                    os.close(descriptor)
            serve(other)
            return
        os.close(other)
    serve(mine)
    for _ in others:
        os.wait()


def serve(descriptor: int) -> None:
    """Answer ranges until the socket is closed at its other end."""
    with socket.socket(fileno=descriptor) as wire, wire.makefile("rb") as source, wire.makefile("wb") as sink:
        dsn = _read(source)
        if dsn is None:
            return
        conn: psycopg.Connection[Any] | None = None
        _send(sink, Answer())
        while (message := _read(source)) is not None:
            try:
                if conn is None or conn.closed:
                    conn = psycopg.connect(_decode_dsn(dsn), autocommit=True)
                    conn.execute(SESSION)
                answer = Answer(check(conn, _decode_range(message)))
            except psycopg.OperationalError as error:
                answer = Answer(unavailable=f"Postgres: {error}")
            _send(sink, answer)


def check(conn: psycopg.Connection[Any], range_: Range) -> Checked:
    """Read and check one range.

    Raises:
        psycopg.OperationalError: the connection was lost.
    """
    with conn.cursor(binary=True) as cursor:
        before = cursor.execute(EVENT_AT, (range_.after,), prepare=True).fetchone()
        if before is None or before[1] is None:
            return DOES_NOT_HOLD
        checking = RangeCheck(range_, before[1])
        after = range_.after
        while after < range_.until:
            rows = _page(cursor, after, range_.until)
            if not rows or checking.feed(rows) is not None:
                return DOES_NOT_HOLD
            after = rows[-1][0]
        return checking.finish()


def _page(cursor: psycopg.Cursor[Any], after: int, until: int) -> list[Any]:
    arguments = {"after": after, "until": until, "rows": PAGE_ROWS, "large": LARGE_BYTES}
    rows = cursor.execute(PAGE, arguments, prepare=True).fetchall()
    if any(row[6] is None and row[7] is not None for row in rows):
        rows = cursor.execute(PAGE_BY_SIZE, arguments | {"bytes": PAGE_BYTES}, prepare=True).fetchall()
    return rows


def _read(source: BinaryIO) -> bytes | None:
    head = source.read(LENGTH_BYTES)
    if len(head) < LENGTH_BYTES:
        return None
    data = source.read(int.from_bytes(head))
    return data if len(data) == int.from_bytes(head) else None


def _send(sink: BinaryIO, answer: Answer) -> None:
    sink.write(framed(answer))
    sink.flush()


if __name__ == "__main__":
    main([int(descriptor) for descriptor in sys.argv[1:]])
