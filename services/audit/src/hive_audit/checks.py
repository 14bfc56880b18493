"""The whole log from its first event on: verified, and exported."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Final

from hive_common.kernel.errors import CorruptLog, InvalidArgument

from hive_audit import export
from hive_audit.log_source import BEFORE_FIRST, LogSource
from hive_audit.verifier import Break, Head, Result, Row, StreamHeads, Verifier

STREAMS_MAX: Final = 500_000
"""Streams held in memory during a check, some 75 MB; those forgotten are looked up in the log again."""


async def learn_streams(source: LogSource, heads: StreamHeads, rows: list[Row]) -> None:
    """Look up the streams of `rows` of which `heads` does not know where they stand before `rows`."""
    unknown = heads.unknown(rows)
    if not unknown:
        return
    found = await source.stream_heads(unknown, rows[0][0] - 1)
    for stream in unknown:
        version, ended = found.get(stream, (0, False))
        heads.learn(stream, version, ended)


async def verify_log(source: LogSource, against: Head | None = None, *, streams_max: int = STREAMS_MAX) -> Result:
    """Check every byte of the log as it stands now, in bounded memory.

    Args:
        source: a connection of its own.
        against: an event that the log must contain, such as the head of an earlier export.
        streams_max: see `StreamHeads`.

    Raises:
        Unavailable: Postgres went away.
    """
    heads = StreamHeads(streams_max)
    verifier = Verifier(heads=heads, against=against)
    head = await source.head()
    until = head.position if head else 0
    async with aclosing(source.pages(BEFORE_FIRST, until)) as pages:
        async for rows in pages:
            await learn_streams(source, heads, rows)
            bad = await asyncio.to_thread(verifier.feed, rows)
            if bad is not None:
                return verifier.finish()
            heads.trim()
    verifier.broken = await _tail(source, verifier.position, until)
    return verifier.finish()


async def _tail(source: LogSource, reached: int, until: int) -> Break | None:
    if reached < until:
        return Break(reached + 1, f"position {reached + 1} is missing: the log went to {until} a moment ago")
    orphan = await source.orphan_payload()
    if orphan is None:
        return None
    return Break(orphan, f"position {orphan} is missing, but its payload is still there: the tail was cut")


async def export_log(source: LogSource, to: int, created: str) -> AsyncIterator[bytes]:
    """Yield the export file of the positions 1 to `to`, some whole lines at a time, checking as it goes.

    Args:
        source: a connection of its own.
        to: last position; 0 for the head as it stands now.
        created: time of the export, ISO 8601.

    Raises:
        InvalidArgument: the log does not go that far.
        CorruptLog: the log does not verify; what was yielded so far is no export, for want of its last line.
    """
    head = await source.head()
    last = head.position if head else 0
    if to < 0 or to > last:
        raise InvalidArgument(f"to: {to}, expected 0 or a position up to {last}", path="to")
    end = await source.event_at(to or last)
    if end is None:
        raise CorruptLog(f"position {to or last} is missing", position=to or last)
    writer: export.Writer | None = None
    verifier = Verifier(heads=StreamHeads(STREAMS_MAX))
    async with aclosing(source.pages(BEFORE_FIRST, to or last)) as pages:
        async for rows in pages:
            await learn_streams(source, verifier.heads, rows)
            bad = await asyncio.to_thread(verifier.feed, rows)
            if bad is not None:
                raise CorruptLog(bad.reason, position=bad.position)
            verifier.heads.trim()
            if writer is None:
                writer = export.Writer()
                header = export.Header(1, verifier.log_id, 1, to or last, end[1].hex(), created)
                yield writer.header(header)
            for chunk in writer.events(rows):
                yield chunk
    if writer is None or verifier.position != (to or last):
        raise CorruptLog(f"position {verifier.position + 1} is missing", position=verifier.position + 1)
    yield writer.trailer()
