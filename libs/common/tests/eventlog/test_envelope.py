"""Envelope bytes: whatever stands in them comes back, and SQL splices exactly what Python would."""

import asyncio
import hashlib
import json
from itertools import count
from typing import Any

import pytest
from hive_common.eventlog.envelope import GENESIS_PREV, SALT_BYTES, envelope_of, prepare, splice, stored_of
from hive_common.eventlog.log import Append, LogReader, LogWriter, NewEvent, leaf_hash, payload_commit
from hive_common.kernel.errors import CorruptLog
from hive_common.testing.fixtures import Database
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

TRICKY = st.text(st.sampled_from('"\\\n\r\t\b\f/{}[]:,\x01\x1f\x7f\u2028\u00e9ß漢🐝👩‍👩‍👧\ufffd a')) | st.text(
    st.characters(exclude_categories=["Cs"])
)
NAME = TRICKY.map(lambda text: text.replace("\x00", "")[:40]).filter(bool)
EVENTS = st.builds(
    NewEvent,
    stream=NAME,
    version=st.just(1),
    type=NAME,
    schema=st.integers(1, 2**31),
    payload=st.binary(max_size=300) | TRICKY.map(lambda text: json.dumps(text).encode()),
    ts_us=st.integers(0, 2**53),
    actor=TRICKY,
    owner=TRICKY,
    ns=TRICKY,
    subject=st.none() | TRICKY,
    correlation=TRICKY,
    causation=TRICKY,
)
SALT = bytes(range(SALT_BYTES))
NASTY = NewEvent(
    'a"\\\n🐝', 1, "T\\u0000", 1, b'"\\\n\x00\xff', 0, '"}', "\\", "\\\\", '{"x":1}', "\u2028", "'; DROP"
)


@given(EVENTS)
@example(NASTY)
def test_every_field_comes_back_from_the_bytes(event: NewEvent) -> None:
    body, commit = prepare("log-id", event, SALT)
    raw = splice(7, GENESIS_PREV, body)
    envelope = envelope_of(raw)
    for field in (
        "stream",
        "version",
        "type",
        "schema",
        "ts_us",
        "actor",
        "owner",
        "ns",
        "subject",
        "correlation",
        "causation",
    ):
        assert getattr(envelope, field) == getattr(event, field)
    assert envelope.payload_commit == commit.hex() == payload_commit(SALT, event.payload).hex()
    parsed: dict[str, Any] = json.loads(raw)
    assert list(parsed)[:6] == ["position", "prev", "log", "ns", "stream", "version"]
    assert ("subject" in parsed) == (event.subject is not None)


_numbers = count(1)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(EVENTS, min_size=1, max_size=5))
@example([NASTY])
def test_database_stores_the_bytes_that_were_meant(database: Database, events: list[NewEvent]) -> None:
    asyncio.run(_append_and_compare(database, events))


async def _append_and_compare(database: Database, events: list[NewEvent]) -> None:
    async with (
        await LogWriter.open(database.role_dsn("scheduler")) as writer,
        LogReader(database.role_dsn("audit")) as reader,
    ):
        head = await reader.head()
        [last] = await reader.read(head - 1)
        # Streams of their own, so that examples do not meet each other.
        fresh = [
            NewEvent(
                f"{next(_numbers)} {event.stream}",
                1,
                event.type,
                event.schema,
                event.payload,
                event.ts_us,
                event.actor,
                event.owner,
                event.ns,
                event.subject,
                event.correlation,
                event.causation,
            )
            for event in events
        ]
        await writer.append(Append(tuple(fresh)))
        stored = await reader.read(head)
    prev = last.hash.hex()
    for position, (event, got) in enumerate(zip(fresh, stored, strict=True), start=head + 1):
        assert got.payload == event.payload
        assert (got.stream, got.type, got.owner, got.subject) == (
            event.stream,
            event.type,
            event.owner,
            event.subject,
        )
        prefix = splice(position, prev, b"")
        assert got.event.startswith(prefix + b'"log":')
        assert got.hash == leaf_hash(got.event) == hashlib.sha256(b"\x00" + got.event).digest()
        prev = got.hash.hex()


def test_salts_of_other_lengths_would_collide_which_is_why_there_are_none() -> None:
    assert payload_commit(b"k", b"p") == payload_commit(b"k\x00", b"p")


@pytest.mark.parametrize("raw", [b"", b"{}", b"[]", b'{"position":"1"}', b"\xff"])
def test_bytes_that_are_no_envelope_are_corrupt(raw: bytes) -> None:
    with pytest.raises(CorruptLog):
        envelope_of(raw)


def test_envelope_at_another_position_is_corrupt() -> None:
    body, _ = prepare("log-id", NASTY, SALT)
    raw = splice(7, GENESIS_PREV, body)
    assert stored_of(7, raw, leaf_hash(raw), None).position == 7
    with pytest.raises(CorruptLog, match="position 8"):
        stored_of(8, raw, leaf_hash(raw), None)
