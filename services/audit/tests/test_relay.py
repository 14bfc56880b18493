"""HIVE_EVENTS is the log's copy: its sequence is the position, whatever happens to NATS or to the log."""

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hive_audit.log_source import LogSource
from hive_audit.relay import Relay, RelaySettings
from hive_common.bus.nats import connect
from hive_common.contracts.messages import EVENTS_STREAM, EVENTS_SUBJECTS
from hive_common.eventlog.log import Append, LogWriter
from hive_common.kernel.ids import new_id
from hive_common.testing.fixtures import Database
from hive_common.testing.identities import EVERYTHING
from hive_common.testing.nats import EmbeddedNats
from nats.aio.client import Client
from nats.js.api import ConsumerConfig, DeliverPolicy, StreamConfig

from .conftest import Tamper
from .histories import event, fill, life


@pytest.fixture
def nats(tmp_path: Path) -> Iterator[EmbeddedNats]:
    server = EmbeddedNats(tmp_path / "nats")
    server.start()
    yield server
    server.stop()


@asynccontextmanager
async def connected(nats: EmbeddedNats, tmp_path: Path) -> AsyncIterator[Client]:
    client = await connect(nats.issuer.service(EVERYTHING, tmp_path), "test")
    try:
        yield client
    finally:
        await client.close()


@asynccontextmanager
async def relaying(database: Database, client: Client, **settings: int) -> AsyncIterator[Relay]:
    relay = Relay(
        lambda: LogSource.open(database.role_dsn("audit")), client, RelaySettings(**settings), asyncio.Event()
    )
    task = asyncio.create_task(relay.run())
    try:
        yield relay
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def eventually(condition: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(60):
        while True:
            found = condition()
            if found if isinstance(found, bool) else await found:
                return
            await asyncio.sleep(0.02)


async def published(client: Client, head: int, first: int = 1) -> list[tuple[int, str, bytes]]:
    """Read HIVE_EVENTS from its first message to `head`, as an extension would."""
    js = client.jetstream()
    subscription = await js.pull_subscribe(
        EVENTS_SUBJECTS,
        stream=EVENTS_STREAM,
        config=ConsumerConfig(deliver_policy=DeliverPolicy.ALL, inactive_threshold=60),
    )
    found: list[tuple[int, str, bytes]] = []
    while len(found) < head - first + 1:
        for message in await subscription.fetch(500, timeout=10):
            found.append((message.metadata.sequence.stream, message.subject, message.data))
            await message.ack()
    await subscription.unsubscribe()
    return found


async def logged(database: Database, first: int = 1) -> list[tuple[int, bytes]]:
    async with await LogSource.open(database.role_dsn("audit")) as source:
        found: list[tuple[int, bytes]] = []
        while rows := await source.envelopes(first - 1, 1000):
            found += [(position, envelope) for position, _, envelope in rows]
            first = rows[-1][0] + 1
        return found


async def is_copy(database: Database, client: Client, first: int = 1) -> bool:
    expected = await logged(database, first)
    found = await published(client, expected[-1][0], first)
    return [(sequence, data) for sequence, _, data in found] == expected


async def test_the_sequence_is_the_position_and_the_subject_names_the_event(
    database: Database, nats: EmbeddedNats, tmp_path: Path
) -> None:
    head = await fill(database, 5)
    async with connected(nats, tmp_path) as client, relaying(database, client) as relay:
        await eventually(lambda: relay.position == head)
        assert relay.problem is None
        found = await published(client, head)
        assert [subject for _, subject, _ in found[:5]] == [
            "hive.events.log.LogCreated",
            "hive.events.task.TaskCreated",
            "hive.events.task.TaskAssigned",
            "hive.events.task.AttemptSucceeded",
            "hive.events.task.TaskSucceeded",
        ]
        assert await is_copy(database, client)
        assert b'{"n":1}' not in b"".join(data for _, _, data in found), "payloads stay in the log"


async def test_a_deleted_stream_comes_back_whole_and_in_order(
    database: Database, nats: EmbeddedNats, tmp_path: Path
) -> None:
    head = await fill(database, 300)
    async with connected(nats, tmp_path) as client, relaying(database, client) as relay:
        await eventually(lambda: relay.position == head)
        js = client.jetstream()
        before = await js.stream_info(EVENTS_STREAM)
        await js.delete_stream(EVENTS_STREAM)

        async def back() -> bool:
            try:
                info = await js.stream_info(EVENTS_STREAM)
            except Exception:
                return False
            return info.created != before.created and info.state.last_seq == head

        await eventually(back)
        assert await is_copy(database, client)


async def test_the_store_of_nats_deleted_while_it_is_down_loses_nothing(
    database: Database, nats: EmbeddedNats, tmp_path: Path
) -> None:
    head = await fill(database, 50)
    async with connected(nats, tmp_path) as client, relaying(database, client) as relay:
        await eventually(lambda: relay.position == head)
        nats.stop(signal.SIGKILL)
        shutil.rmtree(nats.store_dir)
        head = await fill(database, 50)
        nats.start()
        await eventually(lambda: relay.position == head and relay.problem is None)
        assert await is_copy(database, client)


async def test_a_stream_that_reserves_more_than_the_server_has_left_is_made_anew(
    database: Database, server_dir: Path, tmp_path: Path
) -> None:
    def server(store_bytes: int) -> EmbeddedNats:
        # Read after the block that the class writes; the store is the same.
        store = f'store_dir: "{server_dir / "jetstream"}", max_file_store: {store_bytes}'
        return EmbeddedNats(server_dir, f"jetstream {{ {store} }}")

    head = await fill(database, 10)
    roomy = server(2 << 30)
    roomy.start()
    async with connected(roomy, tmp_path) as client, relaying(database, client) as relay:
        await eventually(lambda: relay.position == head)
    roomy.stop()
    small = server(64 << 20)
    small.start()
    try:
        async with connected(small, tmp_path) as client, relaying(database, client) as relay:
            await eventually(lambda: relay.position == head and relay.problem is None)
            info = await client.jetstream().stream_info(EVENTS_STREAM)
            assert 0 < (info.config.max_bytes or 0) <= 64 << 20
            assert await is_copy(database, client)
    finally:
        small.stop()


@pytest.mark.parametrize("torn", ["meta.inf", "meta.sum"])
async def test_a_stream_that_nats_cannot_read_after_a_power_cut_is_made_anew(
    torn: str, database: Database, nats: EmbeddedNats, tmp_path: Path
) -> None:
    head = await fill(database, 50)
    async with connected(nats, tmp_path) as client, relaying(database, client) as relay:
        await eventually(lambda: relay.position == head)
        nats.stop(signal.SIGKILL)
        (file,) = nats.store_dir.rglob(f"streams/*/{torn}")
        file.write_bytes(b"")
        nats.start()
        head = await fill(database, 50)
        await eventually(lambda: relay.position == head and relay.problem is None)
        assert await is_copy(database, client)
        before = client.stats["reconnects"]
        nats.stop(signal.SIGKILL)
        nats.start()
        await eventually(lambda: client.stats["reconnects"] > before and client.is_connected)
        assert await is_copy(database, client)


async def test_several_writers_append_while_nats_is_killed_again_and_again(
    database: Database, nats: EmbeddedNats, tmp_path: Path
) -> None:
    async with connected(nats, tmp_path) as client, relaying(database, client) as relay:
        stop = asyncio.Event()

        async def write(role: str) -> None:
            async with await LogWriter.open(database.role_dsn(role)) as writer:
                while not stop.is_set():
                    await asyncio.gather(*(writer.append(life()) for _ in range(20)))

        writers = [asyncio.create_task(write(role)) for role in ("scheduler", "scheduler", "registry")]
        for _ in range(3):
            await asyncio.sleep(0.5)
            nats.stop(signal.SIGKILL)
            await asyncio.sleep(0.2)
            nats.start()
        stop.set()
        await asyncio.gather(*writers)
        head = (await logged(database))[-1][0]
        await eventually(lambda: relay.position == head)
        assert head > 100
        assert await is_copy(database, client)


async def test_two_relays_side_by_side_publish_each_event_once(
    database: Database, nats: EmbeddedNats, tmp_path: Path
) -> None:
    head = await fill(database, 100)
    async with (
        connected(nats, tmp_path) as one,
        connected(nats, tmp_path) as other,
        relaying(database, one) as first,
        relaying(database, other) as second,
    ):
        await eventually(lambda: first.position == second.position == head)
        head = await fill(database, 100)
        await eventually(lambda: first.position == second.position == head)
        assert await is_copy(database, one)


async def test_the_stream_of_another_log_is_made_anew(
    database: Database, nats: EmbeddedNats, tmp_path: Path
) -> None:
    head = await fill(database, 3)
    async with connected(nats, tmp_path) as client:
        js = client.jetstream()
        await js.add_stream(
            StreamConfig(EVENTS_STREAM, subjects=[EVENTS_SUBJECTS], metadata={"hive_log": new_id()})
        )
        for _ in range(5):
            await js.publish("hive.events.task.TaskReady", b"{}")
        async with relaying(database, client) as relay:
            await eventually(lambda: relay.position == head)
            assert await is_copy(database, client)


async def test_a_stream_ahead_of_a_log_restored_from_a_backup_is_made_anew(
    database: Database, nats: EmbeddedNats, tmp_path: Path, tamper: Tamper
) -> None:
    head = await fill(database, 10)
    async with connected(nats, tmp_path) as client, relaying(database, client) as relay:
        await eventually(lambda: relay.position == head)
        tamper("DELETE FROM log.events WHERE position > 20", "DELETE FROM log.payloads WHERE position > 20")
        await eventually(lambda: relay.position == 20)
        assert await is_copy(database, client)


async def test_a_restored_log_that_has_grown_past_the_stream_is_noticed(
    database: Database, nats: EmbeddedNats, tmp_path: Path, tamper: Tamper
) -> None:
    head = await fill(database, 10)
    async with connected(nats, tmp_path) as client:
        async with relaying(database, client) as relay:
            await eventually(lambda: relay.position == head)
        tamper("DELETE FROM log.events WHERE position > 21", "DELETE FROM log.payloads WHERE position > 21")
        head = await fill(database, 10)
        async with relaying(database, client) as relay:
            await eventually(lambda: relay.position == head)
            assert await is_copy(database, client)


async def test_a_stream_made_anew_reaches_back_as_far_as_it_may(
    database: Database, nats: EmbeddedNats, tmp_path: Path
) -> None:
    head = await fill(database, 25)
    async with (
        connected(nats, tmp_path) as client,
        relaying(database, client, replay_events_max=40) as relay,
    ):
        await eventually(lambda: relay.position == head)
        assert await is_copy(database, client, first=head - 39)


async def test_old_messages_go_when_the_stream_is_full_and_the_sequence_stays_the_position(
    database: Database, nats: EmbeddedNats, tmp_path: Path
) -> None:
    head = await fill(database, 100)
    async with connected(nats, tmp_path) as client, relaying(database, client, max_bytes=64 * 1024) as relay:
        await eventually(lambda: relay.position == head)
        info = await client.jetstream().stream_info(EVENTS_STREAM)
        assert 1 < info.state.first_seq < head == info.state.last_seq
        assert await is_copy(database, client, first=info.state.first_seq)


async def test_a_disk_without_room_for_the_whole_stream_gets_a_smaller_one(
    database: Database, nats: EmbeddedNats, tmp_path: Path
) -> None:
    head = await fill(database, 10)
    async with connected(nats, tmp_path) as client:
        async with relaying(database, client, max_bytes=1 << 60) as relay:
            await eventually(lambda: relay.position == head)
            info = await client.jetstream().stream_info(EVENTS_STREAM)
            assert 0 < info.config.max_bytes < 1 << 60
        async with relaying(database, client, max_bytes=1 << 60) as another:
            await eventually(lambda: another.position == head)
            assert await is_copy(database, client)


async def test_an_unknown_event_stops_the_relay_in_front_of_it(
    database: Database, nats: EmbeddedNats, tmp_path: Path
) -> None:
    head = await fill(database, 1)
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        await writer.append(Append((event(new_id(), type_="SomethingNew"),)))
    await fill(database, 1)
    async with connected(nats, tmp_path) as client, relaying(database, client) as relay:
        await eventually(lambda: (relay.problem or "").startswith("stopped"))
        assert "position 6: unknown event SomethingNew" in str(relay.problem)
        assert relay.position == head == 5
        assert await published(client, head)


async def test_a_hole_in_the_log_stops_the_relay(
    database: Database, nats: EmbeddedNats, tmp_path: Path, tamper: Tamper
) -> None:
    await fill(database, 3)
    tamper("DELETE FROM log.events WHERE position = 7")
    async with connected(nats, tmp_path) as client, relaying(database, client) as relay:
        await eventually(lambda: (relay.problem or "").startswith("stopped"))
        assert "position 7 is missing" in str(relay.problem)
        assert relay.position == 6
