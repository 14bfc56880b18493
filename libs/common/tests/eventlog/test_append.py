"""Appending: positions, chain, conflicts, preconditions, refusals."""

import asyncio
import hashlib
import hmac
from typing import Any

import psycopg
import pytest
from hive_common.eventlog.log import (
    Append,
    LogWriter,
    NewEvent,
    envelope_of,
    leaf_hash,
    payload_commit,
)
from hive_common.kernel.errors import Conflict, InvalidArgument, Unavailable, VersionConflict
from hive_common.kernel.ids import new_id
from hive_common.testing.fixtures import Database


def event(stream: str, version: int = 1, type: str = "TaskCreated", **fields: object) -> NewEvent:
    values = {"schema": 1, "payload": b'{"n":1}', "ts_us": 1, "actor": "a", "owner": "o", **fields}
    return NewEvent(stream=stream, version=version, type=type, **values)  # type: ignore[arg-type]


def append(*events: NewEvent, **expect: int) -> Append:
    return Append(events, expect)


async def test_first_append_follows_genesis_and_hashes_what_is_stored(log: Any) -> None:
    stream = new_id()
    async with (
        await log.writer() as writer,
        log.reader() as reader,
    ):
        assert await writer.append(append(event(stream, subject='s"\\\n🐝'))) == 2
        genesis, stored = await reader.read(0)
    assert genesis.type == "LogCreated"
    assert genesis.stream == log.log_id == writer.log_id
    envelope = envelope_of(stored.event)
    assert envelope.prev == genesis.hash.hex()
    assert envelope.log == log.log_id
    assert stored.hash == leaf_hash(stored.event) == hashlib.sha256(b"\x00" + stored.event).digest()
    assert stored.subject == 's"\\\n🐝'
    assert stored.payload == b'{"n":1}'


async def test_commitment_opens_with_the_stored_salt(database: Database) -> None:
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        await writer.append(append(event(new_id(), payload=b'{"secret":true}')))
    with psycopg.connect(database.dsn) as conn:
        row = conn.execute(
            "SELECT event, payload, salt FROM log.events JOIN log.payloads USING (position) WHERE position = 2"
        ).fetchone()
    assert row is not None
    assert envelope_of(row[0]).payload_commit == payload_commit(row[2], row[1]).hex()


async def test_conflict_fails_only_itself(log: Any) -> None:
    streams = [new_id() for _ in range(20)]
    async with await log.writer() as writer:
        await writer.append(append(event(streams[7])))
        outcomes = await asyncio.gather(
            *(writer.append(append(event(stream))) for stream in streams), return_exceptions=True
        )
    failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    assert len(failed) == 1
    assert isinstance(outcomes[7], VersionConflict)
    assert outcomes[7].fields == {"stream": streams[7], "expected": 0, "actual": 1}
    positions = [outcome for outcome in outcomes if isinstance(outcome, int)]
    assert sorted(positions) == list(range(3, 22))


async def test_append_is_all_or_nothing(log: Any) -> None:
    taken, fresh = new_id(), new_id()
    async with (
        await log.writer() as writer,
        log.reader() as reader,
    ):
        await writer.append(append(event(taken)))
        with pytest.raises(VersionConflict):
            await writer.append(append(event(fresh), event(taken)))
        assert await reader.versions([taken, fresh]) == {taken: 1, fresh: 0}
        assert await reader.head() == 2


async def test_stream_that_is_only_read_must_stand_at_its_version(log: Any) -> None:
    job, task = new_id(), new_id()
    async with await log.writer() as writer:
        await writer.append(append(event(job, type="JobSubmitted")))
        await writer.append(append(event(task), **{job: 1}))
        with pytest.raises(VersionConflict) as caught:
            await writer.append(append(event(task, 2), **{job: 2}))
        assert caught.value.fields == {"stream": job, "expected": 2, "actual": 1}
        await writer.append(append(event(new_id()), **{new_id(): 0}))


async def test_appends_of_one_batch_see_earlier_ones(log: Any) -> None:
    stream = new_id()
    async with await log.writer() as writer:
        # All five are queued before the writer's task runs: one batch.
        outcomes = await asyncio.gather(
            writer.append(append(event(new_id()))),
            writer.append(append(event(stream, 1))),
            writer.append(append(event(stream, 2), event(stream, 3))),
            writer.append(append(event(stream, 2))),
            writer.append(append(event(stream, 4), **{stream: 3})),
            return_exceptions=True,
        )
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [2, 3, 5, 6]
    assert isinstance(outcomes[3], VersionConflict)


async def test_second_terminal_event_is_refused_and_only_the_guilty_append_fails(log: Any) -> None:
    task = new_id()
    async with await log.writer() as writer:
        await writer.append(append(event(task, 1, "TaskSucceeded")))
        outcomes = await asyncio.gather(
            writer.append(append(event(new_id()))),
            writer.append(append(event(new_id()))),
            writer.append(append(event(task, 2, "TaskFailed"))),
            writer.append(append(event(new_id()))),
            return_exceptions=True,
        )
    assert [outcome for outcome in outcomes if isinstance(outcome, int)] == [3, 4, 5]
    assert type(outcomes[2]) is Conflict


async def test_more_than_a_thousand_events_are_refused(log: Any) -> None:
    async with await log.writer() as writer:
        assert await writer.append(Append(tuple(event(new_id()) for _ in range(1000)))) == 1001
        with pytest.raises(InvalidArgument, match="1001"):
            await writer.append(Append(tuple(event(new_id()) for _ in range(1001))))
        with pytest.raises(InvalidArgument):
            await writer.append(Append(()))


async def test_database_itself_refuses_more_than_a_thousand_events(database: Database) -> None:
    async with await psycopg.AsyncConnection.connect(database.role_dsn("scheduler")) as conn:
        with pytest.raises(psycopg.errors.ProgramLimitExceeded):
            await conn.execute(
                "SELECT log.log_append('{}', '{}', '{}', '{}', '{}', '{}', '{}', '{}',"
                " array_fill('x'::bytea, ARRAY[1001]), '{}', '{}')"
            )


@pytest.mark.parametrize(
    "bad",
    [
        event("", 1),
        event("a\x00b", 1),
        event("s" * 201, 1),
        event("s", 0),
        event("s", 2**31),
        event("s", 1, type=""),
        event("s", 1, payload=b"x" * (4 * 1024 * 1024 + 1)),
        event("s", 1, actor="\ud800"),
        event("s\ud800", 1),
    ],
)
async def test_event_that_can_never_be_stored_is_refused_before_it_is_sent(log: Any, bad: NewEvent) -> None:
    async with await log.writer() as writer:
        with pytest.raises(InvalidArgument):
            await writer.append(append(bad))
        assert await writer.append(append(event(new_id()))) == 2


async def test_versions_within_an_append_must_follow_each_other(log: Any) -> None:
    async with await log.writer() as writer:
        with pytest.raises(InvalidArgument):
            await writer.append(append(event("s", 1), event("s", 3)))
        with pytest.raises(InvalidArgument):
            await writer.append(append(event("s", 1), s=4))


async def test_head_hint_names_the_committed_head_and_the_types_that_are_new(log: Any) -> None:
    heads: list[int] = []
    types: list[tuple[str, ...]] = []
    told = asyncio.Event()

    async def on_head(position: int, new_types: tuple[str, ...]) -> None:
        heads.append(position)
        types.append(new_types)
        told.set()

    async with await log.writer(on_head=on_head) as writer:
        published = event(new_id(), type="AgentVersionPublished")
        await writer.append(append(event(new_id()), published, event(new_id())))
        await told.wait()
        assert heads == [4] == [writer.head]
        assert types == [("AgentVersionPublished", "TaskCreated")]
        told.clear()
        await writer.append(append(event(new_id())))
        await told.wait()
        assert types[1:] == [("TaskCreated",)]


async def test_hint_that_fails_does_not_stop_the_writer(log: Any) -> None:
    def on_head(position: int, types: tuple[str, ...]) -> None:
        raise OSError("no bus")

    async with await log.writer(on_head=on_head) as writer:
        for position in (2, 3, 4):
            assert await writer.append(append(event(new_id()))) == position


async def test_closed_writer_wrote_what_was_queued_and_takes_no_more(log: Any) -> None:
    writer = await log.writer()
    waiting = [asyncio.create_task(writer.append(append(event(new_id())))) for _ in range(50)]
    await asyncio.sleep(0)
    await writer.close()
    assert sorted(await asyncio.gather(*waiting)) == list(range(2, 52))
    with pytest.raises(Unavailable):
        await writer.append(append(event(new_id())))


async def test_second_writer_on_a_connection_appends_like_the_first(database: Database) -> None:
    async with await psycopg.AsyncConnection.connect(database.role_dsn("scheduler"), autocommit=True) as conn:
        for position in (2, 3):
            async with await LogWriter.open(conn, reconnect=False) as writer:
                assert await writer.append(append(event(new_id()))) == position


async def test_batch_larger_than_the_socket_takes_at_once_is_appended(log: Any) -> None:
    payload = b'"' + b"x" * (4 * 1024 * 1024 - 2) + b'"'
    async with await log.writer() as writer:
        positions = await asyncio.gather(
            *(writer.append(append(event(new_id(), payload=payload))) for _ in range(3))
        )
    assert positions == [2, 3, 4]


async def test_many_callers_at_once_go_in_several_batches_in_their_order(log: Any) -> None:
    streams = [new_id() for _ in range(200)]
    heads: list[int] = []
    async with await log.writer(on_head=lambda position, _: heads.append(position)) as writer:
        first = await asyncio.gather(*(writer.append(append(event(stream))) for stream in streams))
        second = await asyncio.gather(*(writer.append(append(event(stream, 2))) for stream in streams))
    assert first == list(range(2, 202)) and second == list(range(202, 402))
    assert heads[0] < 201, "the first half is committed and told while the second is on its way"


@pytest.mark.parametrize("bytes_of", [(0, 0), (31, 5), (32, 0), (32, 63), (32, 1000), (33, 5), (64, 5), (65, 5)])
def test_commitment_is_the_hmac_of_the_standard_library(bytes_of: tuple[int, int]) -> None:
    salt, payload = (b"\x5a" * count for count in bytes_of)
    assert payload_commit(salt, payload) == hmac.digest(salt, payload, "sha256")
