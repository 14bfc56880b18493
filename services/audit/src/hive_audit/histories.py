"""Streams of the log as events, each row checked where it stands: its bytes, its stream, its place in the chain."""

from collections.abc import Iterable, Iterator
from typing import Final, NamedTuple, TypeVar

import msgspec
from hive_common.contracts import events
from hive_common.kernel.errors import UnknownEvent

from hive_audit.log_source import LogSource
from hive_audit.verifier import Head, Row, StreamHeads, Verifier

STREAM_EVENTS_MAX: Final = 2_000
"""Of one stream: a task has 100 attempts at most, each with a handful of events."""

T = TypeVar("T", bound=events.Event)


class Said(NamedTuple):
    """An event and where it stands."""

    position: int
    event: events.Event


class History(msgspec.Struct, frozen=True):
    """What a stream says, in its order. `wrong` is what does not hold about its rows."""

    stream: str
    said: tuple[Said, ...]
    job: str = ""
    wrong: tuple[str, ...] = ()

    def of(self, kind: type[T], before: int | None = None) -> Iterator[tuple[int, T]]:
        """Iterate the events of a type, those at positions under `before` alone if it is given."""
        for position, event in self.said:
            if isinstance(event, kind) and (before is None or position < before):
                yield position, event


class _Envelope(msgspec.Struct):
    prev: str
    log: str
    schema: int
    correlation: str


_envelope = msgspec.json.Decoder(_Envelope).decode


async def history_of(source: LogSource, stream: str) -> History:
    """Read a stream and check its rows; one that is not there has no events.

    Each row is held against those beside it. That the chain holds from its beginning to its head is what the whole
    verification says.
    """
    rows = await source.stream(stream, STREAM_EVENTS_MAX)
    if not rows:
        return History(stream, ())
    beside = await source.beside([row[0] for row in rows])
    wrong = [*_wrong(rows, beside)]
    said: list[Said] = []
    for row in rows:
        try:
            event = events.decode(row[3], _envelope(row[4]).schema, row[6] or b"")
        except (UnknownEvent, msgspec.DecodeError) as error:
            wrong.append(f"position {row[0]}: {error}")
        else:
            said.append(Said(row[0], event))
    return History(stream, tuple(said), _job_of(rows[0]), tuple(wrong))


def _wrong(rows: Iterable[Row], beside: dict[int, tuple[bytes, bytes]]) -> Iterator[str]:
    genesis = beside.get(1)
    log_id = _log_of(genesis[0]) if genesis else ""
    ended = False
    for number, row in enumerate(rows, 1):
        position = row[0]
        before = beside.get(position - 1)
        if before is None and position > 1:
            yield f"position {position - 1} is missing"
            continue
        heads = StreamHeads(complete=False)
        heads.learn(row[1], number - 1, ended)
        start = Head(position - 1, before[1]) if before else None
        verifier = Verifier(start, log_id=log_id, heads=heads)
        bad = verifier.feed([row])
        if bad is not None:
            yield bad.reason
        ended = bool(heads.states.get(row[1], 0) & 1)
        after = beside.get(position + 1)
        if after is not None and _prev_of(after[0]) != row[5].hex():
            yield f"position {position}: the event behind it names another hash: one of the two was replaced"


def _log_of(event: bytes) -> str:
    try:
        return _envelope(event).log
    except msgspec.DecodeError:
        return ""


def _prev_of(event: bytes) -> str:
    try:
        return _envelope(event).prev
    except msgspec.DecodeError:
        return ""


def _job_of(row: Row) -> str:
    try:
        return _envelope(row[4]).correlation
    except msgspec.DecodeError:
        return ""
