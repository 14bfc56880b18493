"""From appends to the parameters of one `log_append` call, and back to an answer for each."""

import os
from collections.abc import Sequence
from typing import Any

from hive_common.eventlog.envelope import EVENTS_PER_CALL_MAX, SALT_BYTES, Append, prepare
from hive_common.eventlog.pgarrays import bytea_array, element, int_array, text_array
from hive_common.kernel.errors import InvalidArgument

_SALTS_PER_DRAW = 256

CALL = (
    "SELECT positions, conflict_streams, actual_versions"
    " FROM log.log_append(%b, %b, %b, %b, %b, %b, %b, %b, %b, %b, %b)"
)


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
        if not 0 < len(append.events) <= EVENTS_PER_CALL_MAX:
            raise InvalidArgument(f"an append has {len(append.events)} events, expected 1 to {EVENTS_PER_CALL_MAX}")
        self.expected = _expected(append)
        self.streams = [event.stream for event in append.events]
        self.versions = [event.version for event in append.events]
        self.types = [element(event.type.encode()) for event in append.events]
        self.payloads = [element(event.payload) for event in append.events]
        drawn = [salts.take() for _ in append.events]
        self.salts = [element(salt) for salt in drawn]
        made = [prepare(log_id, event, salt) for event, salt in zip(append.events, drawn, strict=True)]
        self.bodies = [element(body) for body, _ in made]
        self.commits = [commit for _, commit in made]
        self.byte_count = sum(map(len, self.bodies)) + sum(map(len, self.payloads))


def _expected(append: Append) -> dict[str, int]:
    expected: dict[str, int] = {}
    heads: dict[str, int] = {}
    for event in append.events:
        stream, version = event.stream, event.version
        if stream not in heads:
            expected[stream] = version - 1
        elif version != heads[stream] + 1:
            raise InvalidArgument(
                f"stream {stream}: version {version} follows {heads[stream]} in one append, "
                f"expected {heads[stream] + 1}"
            )
        heads[stream] = version
    for stream, version in append.expect.items():
        if expected.setdefault(stream, version) != version:
            raise InvalidArgument(
                f"stream {stream}: expected at version {version} and written from {expected[stream]}"
            )
    return expected


def parameters_of(batch: Sequence[Prepared]) -> tuple[list[str], tuple[Any, ...]]:
    """Return the streams of a batch, in the order of their indices from 1, and the parameters of `CALL`."""
    indices: dict[str, int] = {}
    precondition_streams: list[int] = []
    precondition_versions: list[int] = []
    event_streams: list[int] = []
    for append in batch:
        for stream, version in append.expected.items():
            precondition_streams.append(indices.setdefault(stream, len(indices) + 1))
            precondition_versions.append(version)
        event_streams += [indices[stream] for stream in append.streams]
    parameters = (
        text_array([element(stream.encode()) for stream in indices]),
        int_array([len(append.expected) for append in batch]),
        int_array([len(append.bodies) for append in batch]),
        int_array(precondition_streams),
        int_array(precondition_versions),
        int_array(event_streams),
        int_array([version for append in batch for version in append.versions]),
        text_array([item for append in batch for item in append.types]),
        bytea_array([item for append in batch for item in append.bodies]),
        bytea_array([item for append in batch for item in append.payloads]),
        bytea_array([item for append in batch for item in append.salts]),
    )
    return list(indices), parameters
