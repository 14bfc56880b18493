"""The whole log from its first event on: verified, and exported."""

import asyncio
import itertools
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import aclosing
from typing import Final

from hive_common.kernel.errors import CorruptLog, InvalidArgument

from hive_audit import export
from hive_audit.log_source import BEFORE_FIRST, LogSource
from hive_audit.range_processes import RangeProcesses, processes_here
from hive_audit.ranges import Checked, Range, join
from hive_audit.verifier import Break, Head, Result, StreamHeads, Verifier

STREAMS_MAX: Final = 500_000
"""Streams held in memory during a check, some 75 MB; those forgotten are looked up in the log again."""

RANGE_EVENTS: Final = 8_192
PROCESSES_FROM_EVENTS: Final = 50_000
"""A shorter log is checked before other processes have started."""


async def learn_streams(source: LogSource, heads: StreamHeads, streams: Iterable[str], after: int) -> None:
    """Look up those of `streams` of which `heads` does not know where they stand at position `after`."""
    unknown = heads.unknown(streams)
    if not unknown:
        return
    found = await source.stream_heads(unknown, after)
    for stream in unknown:
        version, ended = found.get(stream, (0, False))
        heads.learn(stream, version, ended)


async def verify_log(
    source: LogSource,
    against: Head | None = None,
    *,
    streams_max: int = STREAMS_MAX,
    processes: int | None = None,
    range_events: int = RANGE_EVENTS,
) -> Result:
    """Check every byte of the log as it stands now, in bounded memory.

    Args:
        source: a connection of its own.
        against: an event that the log must contain, such as the head of an earlier export.
        streams_max: see `StreamHeads`.
        processes: how many check ranges of a long log beside this one; None for what the machine has.
        range_events: what one of them is given at a time.

    Raises:
        Unavailable: Postgres or one of the processes went away.
    """
    verifier = Verifier(heads=StreamHeads(streams_max), against=against)
    head = await source.head()
    until = head.position if head else 0
    if processes is None:
        processes = processes_here() if until >= PROCESSES_FROM_EVENTS else 0
    if processes:
        async with RangeProcesses(source.dsn, processes) as others:
            await _check_ranges(source, verifier, others, until, against, range_events)
    if verifier.position < until and verifier.broken is None:
        await _check_rows(source, verifier, until)
    if verifier.broken is None:
        verifier.broken = await _tail(source, verifier.position, until)
    return verifier.finish()


async def _check_rows(source: LogSource, verifier: Verifier, until: int) -> None:
    """Check in this process what follows, up to `until` or to the first break."""
    async with aclosing(source.pages(verifier.position or BEFORE_FIRST, until)) as pages:
        async for rows in pages:
            await learn_streams(source, verifier.heads, (row[1] for row in rows), rows[0][0] - 1)
            if await asyncio.to_thread(verifier.feed, rows) is not None:
                return
            verifier.heads.trim()


async def _check_ranges(
    source: LogSource,
    verifier: Verifier,
    others: RangeProcesses,
    until: int,
    against: Head | None,
    range_events: int,
) -> None:
    """Let other processes check, and join what they find, up to `until` or to where something does not fit."""
    while verifier.position == 0 or (verifier.position < until and not others.ready):
        before = verifier.position
        await _check_rows(source, verifier, min(before + range_events, until))
        if verifier.broken is not None or verifier.position == before:
            return
    ranges = _ranges(verifier, until, against, range_events)
    checks: deque[tuple[Range, asyncio.Task[Checked]]] = deque()
    try:
        while True:
            # A range more for each process than it works on, so that none waits for this one.
            for range_ in itertools.islice(ranges, 2 * others.count - len(checks)):
                checks.append((range_, asyncio.create_task(others.check(range_))))
            if not checks:
                return
            range_, check = checks.popleft()
            checked = await check
            streams = itertools.chain(checked.begun, checked.continued)
            await learn_streams(source, verifier.heads, streams, range_.after)
            rewritten = (
                against is not None and against.position == range_.until and against.hash != checked.end_hash
            )
            if rewritten or not join(verifier, range_, checked):
                return
            verifier.heads.trim()
    finally:
        for _, check in checks:
            check.cancel()
        await asyncio.gather(*(check for _, check in checks), return_exceptions=True)


def _ranges(verifier: Verifier, until: int, against: Head | None, range_events: int) -> Iterator[Range]:
    after = verifier.position
    while after < until:
        end = min(after + range_events, until)
        if against is not None and after < against.position < end:
            end = against.position
        yield Range(after, end, verifier.log_id)
        after = end


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
            await learn_streams(source, verifier.heads, (row[1] for row in rows), rows[0][0] - 1)
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
