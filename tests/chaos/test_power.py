"""The power fails: what was acknowledged is on the disk, and everything goes on from there.

The rig is judged first. A disk whose power is cut (`PowerDisk`) has to show what a server lost that did not sync:
the same cut has to lose acknowledged commits of a PostgreSQL with `fsync=off`, and acknowledged messages of a
JetStream with its default `sync_interval`. A rig that loses nothing there proves nothing elsewhere.
"""

import signal
import threading

import nats
import psycopg
import pytest
from hive_common.testing.faults import PowerDisk, lacking
from hive_common.testing.nats import EmbeddedNats
from hive_common.testing.postgres import EmbeddedPostgres

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(lacking("mkfs.ext4", "mount")), reason=lacking("mkfs.ext4", "mount")),
]

ACKNOWLEDGED_MIN = 50


@pytest.fixture
def disk(tmp_path):
    with PowerDisk(tmp_path / "disk.img", tmp_path / "disk", size_mib=256) as made:
        yield made


@pytest.mark.parametrize(("fsync", "loses"), [("on", False), ("off", True)])
def test_the_rig_shows_whether_postgres_synced_what_it_acknowledged(fsync, loses, disk):
    server = EmbeddedPostgres(disk.folder / "postgres")
    server.start()
    with psycopg.connect(server.dsn(), autocommit=True) as conn:
        conn.execute("CREATE TABLE acknowledged (n int)")
        conn.execute("CHECKPOINT")
    server.stop()

    tried = EmbeddedPostgres(disk.folder / "postgres", {"fsync": fsync})
    tried.password = server.password
    tried.start()
    acknowledged = _insert_until_cut(tried, disk)
    tried.stop(signal.SIGKILL)
    disk.restore()
    server.start()
    try:
        with psycopg.connect(server.dsn()) as conn:
            found = {n for (n,) in conn.execute("SELECT n FROM acknowledged")}
    finally:
        server.stop()
    lost = set(range(acknowledged)) - found
    print(f"fsync={fsync}: acknowledged {acknowledged}, lost {len(lost)}")
    assert bool(lost) == loses


def _insert_until_cut(server, disk):
    """Insert 0, 1, 2 … each in a commit of its own while the power is cut; return how many were acknowledged."""
    acknowledged = 0
    enough = threading.Event()

    def insert():
        nonlocal acknowledged
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            while True:
                try:
                    conn.execute("INSERT INTO acknowledged VALUES (%s)", (acknowledged,))
                except psycopg.Error:
                    return
                acknowledged += 1
                if acknowledged >= ACKNOWLEDGED_MIN:
                    if enough.is_set() and acknowledged > 20 * ACKNOWLEDGED_MIN:
                        return  # a server that does not sync goes on as if nothing had happened
                    enough.set()

    inserting = threading.Thread(target=insert)
    inserting.start()
    assert enough.wait(60)
    disk.cut()
    inserting.join(60)
    assert not inserting.is_alive()
    return acknowledged


@pytest.mark.parametrize(("sync_interval", "loses"), [("always", False), ("2m", True)])
async def test_the_rig_shows_whether_jetstream_synced_what_it_acknowledged(sync_interval, loses, disk):
    folder = disk.folder / "nats"
    # Read after the one that the server class writes; the store is the same.
    server = EmbeddedNats(
        folder, f'jetstream {{ store_dir: "{folder / "jetstream"}", sync_interval: {sync_interval} }}'
    )
    server.start()
    client = await nats.connect(server.url, allow_reconnect=False)
    js = client.jetstream(timeout=2)
    await js.add_stream(name="ACKNOWLEDGED", subjects=["acknowledged"])
    # What the file system holds of the empty stream is not in question.
    disk.sync()
    acknowledged = 0
    while acknowledged < 10 * ACKNOWLEDGED_MIN:
        acknowledged = (await js.publish("acknowledged", b"x" * 100)).seq
    disk.cut()
    server.stop(signal.SIGKILL)
    await client.close()
    disk.restore()

    server.start()
    try:
        client = await nats.connect(server.url)
        found = (await client.jetstream().stream_info("ACKNOWLEDGED")).state.messages
        await client.close()
    finally:
        server.stop()
    print(f"sync_interval={sync_interval}: acknowledged {acknowledged}, lost {acknowledged - found}")
    assert (found < acknowledged) == loses
