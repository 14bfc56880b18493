"""From appends to the parameters of one `log_append` call, and back to an answer for each."""

import functools
import os
from collections.abc import Iterator, Sequence

from hive_common.eventlog.envelope import EVENTS_PER_CALL_MAX, SALT_BYTES, Append, prepare
from hive_common.eventlog.pgarrays import (
    ByteaArray,
    IntArray,
    TextArray,
    bigints_of,
    bytea_array,
    element,
    int_array,
    ints_of,
    text_array,
)
from hive_common.kernel.errors import InvalidArgument

_SALTS_PER_DRAW = 256
_SALT_LENGTH = SALT_BYTES.to_bytes(4)

PARAMETER_OIDS = (TextArray.oid, *(6 * (IntArray.oid,)), TextArray.oid, *(3 * (ByteaArray.oid,)))
_QUERY = "SELECT positions, conflict_streams, actual_versions FROM log.log_append({})"
CALL = _QUERY.format(", ".join("%b" for _ in PARAMETER_OIDS))
"""For psycopg's cursors."""
CALL_NUMBERED = _QUERY.format(", ".join(f"${number}" for number in range(1, len(PARAMETER_OIDS) + 1)))
"""For libpq."""


class Salts:
    """Random salts, drawn from the system many at a time."""

    def __init__(self) -> None:
        self._pool = b""
        self._used = 0

    def take(self) -> bytes:
        """Return 32 random bytes that were never given before."""
        if self._used >= len(self._pool):
            self._pool = os.urandom(SALT_BYTES * _SALTS_PER_DRAW)
            self._used = 0
        salt = self._pool[self._used : self._used + SALT_BYTES]
        self._used += SALT_BYTES
        return salt


class Prepared:
    """An append whose bytes are made. Sent again, it is sent exactly like this.

    Attributes:
        expected: stream → the version at which it must stand, for streams written and streams only read.
        commits: the payload commitments, in order of the events.
    """

    __slots__ = (
        "bodies",
        "byte_count",
        "commits",
        "expected",
        "payloads",
        "salts",
        "streams",
        "types",
        "versions",
    )

    def __init__(self, log_id: str, append: Append, salts: Salts) -> None:
        events = append.events
        if not 0 < len(events) <= EVENTS_PER_CALL_MAX:
            raise InvalidArgument(f"an append has {len(events)} events, expected 1 to {EVENTS_PER_CALL_MAX}")
        self.expected = _expected(append)
        self.streams: list[str] = []
        self.versions: list[int] = []
        self.types: list[bytes] = []
        self.bodies: list[bytes] = []
        self.payloads: list[bytes] = []
        self.salts: list[bytes] = []
        self.commits: list[bytes] = []
        self.byte_count = 0
        # One loop and not a comprehension for each list: most appends have one event.
        for event in events:
            salt = salts.take()
            body, commit = prepare(log_id, event, salt)
            self.streams.append(event.stream)
            self.versions.append(event.version)
            self.types.append(_type_element(event.type))
            self.bodies.append(element(body))
            self.payloads.append(element(event.payload))
            self.salts.append(_SALT_LENGTH + salt)
            self.commits.append(commit)
            self.byte_count += len(body) + len(event.payload)


@functools.lru_cache(1024)
def _type_element(type_: str) -> bytes:
    return element(type_.encode())


def _expected(append: Append) -> dict[str, int]:
    expected: dict[str, int] = {}
    heads: dict[str, int] = {}
    for event in append.events:
        stream, version = event.stream, event.version
        head = heads.get(stream)
        if head is None:
            expected[stream] = version - 1
        elif version != head + 1:
            raise InvalidArgument(
                f"stream {stream}: version {version} follows {head} in one append, expected {head + 1}"
            )
        heads[stream] = version
    for stream, version in append.expect.items():
        if expected.setdefault(stream, version) != version:
            raise InvalidArgument(
                f"stream {stream}: expected at version {version} and written from {expected[stream]}"
            )
    return expected


def parameters_of(batch: Sequence[Prepared]) -> tuple[list[str], tuple[bytes, ...]]:
    """Return the streams of a batch, in the order of their indices from 1, and the parameters of `CALL`."""
    indices: dict[str, int] = {}
    precondition_counts: list[int] = []
    precondition_streams: list[int] = []
    precondition_versions: list[int] = []
    event_counts: list[int] = []
    event_streams: list[int] = []
    event_versions: list[int] = []
    types: list[bytes] = []
    bodies: list[bytes] = []
    payloads: list[bytes] = []
    salts: list[bytes] = []
    for append in batch:
        precondition_counts.append(len(append.expected))
        for stream, version in append.expected.items():
            precondition_streams.append(indices.setdefault(stream, len(indices) + 1))
            precondition_versions.append(version)
        event_counts.append(len(append.bodies))
        event_streams += [indices[stream] for stream in append.streams]
        event_versions += append.versions
        types += append.types
        bodies += append.bodies
        payloads += append.payloads
        salts += append.salts
    parameters = (
        text_array([element(stream.encode()) for stream in indices]),
        int_array(precondition_counts),
        int_array(event_counts),
        int_array(precondition_streams),
        int_array(precondition_versions),
        int_array(event_streams),
        int_array(event_versions),
        text_array(types),
        bytea_array(bodies),
        bytea_array(payloads),
        bytea_array(salts),
    )
    return list(indices), parameters


def answers_of(row: Sequence[bytes | None]) -> Iterator[tuple[int, int, int]]:
    """Yield position, conflicting stream and its version, for each append of the batch that was answered."""
    positions, conflict_streams, actual_versions = row
    assert positions is not None and conflict_streams is not None and actual_versions is not None
    return zip(bigints_of(positions), ints_of(conflict_streams), ints_of(actual_versions), strict=True)
