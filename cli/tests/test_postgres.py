"""The embedded PostgreSQL as the supervisor runs it: prepared once, and back after every kill."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import psutil
import psycopg
import pytest
from hive_cli.home import Home, Settings
from hive_cli.supervisor.database import admin_dsn, prepare_database
from hive_cli.supervisor.plan import postgres_spec
from hive_cli.supervisor.postgres import clear_leftovers, ensure_cluster
from hive_cli.supervisor.process import Child
from hive_cli.supervisor.provision import provision
from hive_common.kernel.errors import FailedPrecondition
from hive_common.ops.embedded import postgres_command


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> tuple[Home, Settings]:
    home = Home(tmp_path_factory.mktemp("home"))
    settings = provision(home, 1)
    assert ensure_cluster(home)
    assert not ensure_cluster(home)
    return home, settings


@pytest.fixture
async def server(cluster: tuple[Home, Settings]) -> AsyncIterator[Child]:
    child = Child(postgres_spec(*cluster), lambda: None, lambda text: None)
    child.start()
    await until(child.is_ready.is_set)
    yield child
    await child.stop()


async def until(holds: Callable[[], bool], seconds: float = 40) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.02)


async def test_preparing_the_database_again_finds_the_same_log(
    server: Child, cluster: tuple[Home, Settings]
) -> None:
    first = await prepare_database(*cluster)
    assert await prepare_database(*cluster) == first


async def test_a_database_whose_text_would_come_back_as_bytes_is_refused(
    server: Child, cluster: tuple[Home, Settings]
) -> None:
    drop, make = (
        "DROP DATABASE IF EXISTS hive",
        "CREATE DATABASE hive TEMPLATE template0 LOCALE 'C' LOCALE_PROVIDER libc",
    )
    async with await psycopg.AsyncConnection.connect(admin_dsn(*cluster, "postgres"), autocommit=True) as conn:
        await conn.execute(drop)
        await conn.execute(f"{make} ENCODING 'SQL_ASCII'")
        try:
            with pytest.raises(FailedPrecondition, match="database hive: its encoding is SQL_ASCII, expected UTF8"):
                await prepare_database(*cluster)
        finally:
            await conn.execute(drop)


async def test_it_comes_back_after_a_kill_with_what_was_committed(
    server: Child, cluster: tuple[Home, Settings]
) -> None:
    dsn = admin_dsn(*cluster, "postgres")
    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await conn.execute("CREATE TABLE IF NOT EXISTS kept (n int)")
        await conn.execute("INSERT INTO kept VALUES (1)")
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: server.restarts == 1 and server.snapshot().state == "ready")
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        rows = await (await conn.execute("SELECT count(*) FROM kept")).fetchall()
    assert rows[0][0] >= 1
    assert len(server.exits) == 1, "one start must be enough: what the dead server left is waited for"


async def test_a_pid_file_that_names_somebody_else_does_not_stop_it(cluster: tuple[Home, Settings]) -> None:
    home, settings = cluster
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    pid_file = home.postgres_dir / "postmaster.pid"
    pid_file.write_text(f"{other.pid}\n{home.postgres_dir}\n{int(time.time())}\n{settings.ports['postgres']}\n\n")
    child = Child(postgres_spec(home, settings), lambda: None, lambda text: None)
    try:
        child.start()
        await until(child.is_ready.is_set)
        assert child.exits == []
        assert other.poll() is None
    finally:
        await child.stop()
        other.kill()
        other.wait()


async def test_a_running_server_is_never_taken_for_a_leftover_of_another_folder(
    server: Child, tmp_path: Path
) -> None:
    (tmp_path / "other").mkdir()
    await clear_leftovers(tmp_path / "other")
    assert server.pid is not None
    assert psutil.Process(server.pid).is_running()


@pytest.mark.skipif(sys.platform != "linux", reason="PR_SET_PDEATHSIG is Linux's; elsewhere the leash does it")
def test_it_ends_when_the_process_that_started_it_is_killed(cluster: tuple[Home, Settings], tmp_path: Path) -> None:
    home, settings = cluster
    command = postgres_command(home.postgres_dir, port=settings.ports["postgres"], die_with_parent=True)
    starter = (
        f"import subprocess, sys, time; p = subprocess.Popen({command!r}); print(p.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", starter], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert parent.stdout is not None
    postmaster = psutil.Process(int(parent.stdout.readline()))
    deadline = time.monotonic() + 20
    while not (home.postgres_dir / "postmaster.pid").exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    postmaster.wait(10)
