"""The power fails: what was acknowledged is on the disk, and everything goes on from there.

The rig is judged first. A disk whose power is cut (`PowerDisk`) has to show what a server lost that did not sync:
the same cut has to lose acknowledged commits of a PostgreSQL with `fsync=off`, and acknowledged messages of a
JetStream with its default `sync_interval`. A rig that loses nothing there proves nothing elsewhere.
"""

import contextlib
import os
import random
import shutil
import signal
import tempfile
import threading
import time
from pathlib import Path

import nats
import psycopg
import pytest
import yaml
from hive_common.testing.faults import PowerDisk, lacking, settled_on
from hive_common.testing.installation import Installation, wait_until
from hive_common.testing.nats import EmbeddedNats
from hive_common.testing.postgres import EmbeddedPostgres
from hive_common.testing.witness import Witness, published

pytestmark = [
    pytest.mark.chaos,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(lacking("mkfs.ext4", "mount")), reason=lacking("mkfs.ext4", "mount")),
]

HERE = Path(__file__).parent
ACKNOWLEDGED_MIN = 50
LONG = "HIVE_CHAOS_ROUNDS" in os.environ
CUTS = 5 if LONG else 1
only_long = pytest.mark.skipif(not LONG, reason="takes minutes: make chaos")
JOB = {**yaml.safe_load((HERE / "job.yaml").read_text()), "input": {"numbers": [1, 2, 3], "ms": 10}}


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


@pytest.fixture
def home():
    folder = Path(tempfile.mkdtemp(prefix="hive-power-"))
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def whole_home(home, tmp_path):
    """An installation all of which is on a disk whose power can be cut."""
    with PowerDisk(tmp_path / "disk.img", home) as disk:
        installation = Installation(home)
        try:
            installation.up(executors=2)
            installation.hive("agent", "push", str(HERE / "agents" / "spin"))
            yield installation, disk
        finally:
            installation.hive("down", check=False)


def cut(installation, disk, seed):
    """Cut the power while jobs run and are acknowledged, start again, and hold it to everything acknowledged."""
    with Witness(installation, JOB, pause_s=0.2) as witness:
        witness.wait(jobs=10, outcomes=10)
        tree = installation.processes_tree()
        time.sleep(random.Random(seed).uniform(0, 0.5))
        disk.cut()
        installation.kill_everything(tree)
        disk.restore()
        back_at = time.monotonic()
        installation.up(executors=2)
        up_s = time.monotonic() - back_at
        witness.next_acknowledged()
        acknowledged_s = time.monotonic() - back_at
        witness.leave()
        witness.check(installation)
    wait_until(lambda: published(installation) >= installation.verify()["head"], 60, "HIVE_EVENTS is whole again")
    print(
        f"power cut {seed}: acknowledged {len(witness.jobs)} jobs, {len(witness.outcomes)} outcomes; lost 0; "
        f"up after {up_s:.1f} s, acknowledges again after {acknowledged_s:.1f} s"
    )


def test_a_machine_without_power_loses_nothing_acknowledged(whole_home):
    for seed in range(CUTS):
        cut(*whole_home, seed)


@only_long
@pytest.mark.parametrize("part", ["postgres", "nats"])
def test_a_disk_without_power_under_one_server_loses_nothing_acknowledged(part, home, tmp_path):
    with running_on(lambda folder: PowerDisk(tmp_path / "disk.img", folder), home, part) as (installation, disk):
        for seed in range(CUTS):
            cut(installation, disk, seed)


@only_long
def test_the_witness_notices_a_database_that_acknowledges_before_it_syncs(home, tmp_path):
    """The control: the same cut, commits that are acknowledged first and synced up to ten seconds later."""
    with running_on(lambda folder: PowerDisk(tmp_path / "disk.img", folder), home, "postgres") as (
        installation,
        disk,
    ):
        with psycopg.connect(installation.admin_dsn(), autocommit=True) as conn:
            conn.execute("ALTER SYSTEM SET wal_writer_delay = '10s'")
            conn.execute("ALTER SYSTEM SET wal_writer_flush_after = '1GB'")
            conn.execute("SELECT pg_reload_conf()")
            conn.execute("ALTER DATABASE hive SET synchronous_commit = off")
            # What is set for a database counts for new sessions.
            conn.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename LIKE 'hive_%'")
        installation.wait_ready()
        with pytest.raises(AssertionError, match=r"acknowledged (jobs|outcomes) are lost") as noticed:
            cut(installation, disk, 0)
        print(str(noticed.value).split(":")[0])


@contextlib.contextmanager
def running_on(make_disk, home, part):
    """Run an installation with the data of one server on a disk of its own."""
    installation = Installation(home)
    try:
        installation.up(executors=2)
        installation.hive("agent", "push", str(HERE / "agents" / "spin"))
        installation.down()
        with settled_on(home / "data" / part, make_disk) as disk:
            try:
                installation.up(executors=2)
                yield installation, disk
            finally:
                installation.hive("down", check=False)
    finally:
        installation.hive("down", check=False)
