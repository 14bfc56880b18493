"""The embedded servers: they start, restart on their data, and keep strangers out."""

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import nats
import psycopg
import pytest
from hive_common.kernel.errors import FailedPrecondition, Unavailable
from hive_common.ops import embedded
from hive_common.testing.nats import EmbeddedNats
from hive_common.testing.postgres import EmbeddedPostgres
from hive_common.testing.process import ServerProcess


def test_cluster_survives_kill_and_keeps_what_was_committed(server_dir: Path) -> None:
    server = EmbeddedPostgres(server_dir)
    server.start()
    try:
        with psycopg.connect(server.dsn(), autocommit=True) as conn:
            assert conn.execute("SHOW fsync").fetchone() == ("on",)
            assert conn.execute("SHOW data_checksums").fetchone() == ("on",)
            conn.execute("CREATE TABLE kept (n int)")
            conn.execute("INSERT INTO kept VALUES (7)")
        server.stop(signal.SIGKILL)
        server.start()
        with psycopg.connect(server.dsn()) as conn:
            assert conn.execute("SELECT n FROM kept").fetchone() == (7,)
    finally:
        server.stop()


def test_password_is_needed_over_tcp_and_over_the_socket(postgres_server: EmbeddedPostgres) -> None:
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(postgres_server.dsn(password="wrong"))
    with pytest.raises(psycopg.OperationalError, match="password"):
        psycopg.connect(
            host=str(postgres_server.data_dir),
            port=postgres_server.port,
            user=embedded.SUPERUSER,
            password="wrong",
            dbname="postgres",
        )


def test_password_stands_neither_in_argv_nor_in_a_file_left_behind(postgres_server: EmbeddedPostgres) -> None:
    command = embedded.postgres_command(postgres_server.data_dir, port=1)
    assert postgres_server.password not in " ".join(command)
    for file in postgres_server.directory.iterdir():
        if file.is_file():
            assert postgres_server.password not in file.read_text(errors="replace")


def test_socket_is_left_out_where_its_path_would_be_too_long(tmp_path: Path) -> None:
    short = embedded.postgres_command(Path("/d"), port=5432)
    assert "unix_socket_directories=/d" in short
    deep = embedded.postgres_command(tmp_path / ("x" * 120), port=5432)
    assert "unix_socket_directories=" in deep


def test_folder_that_holds_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FailedPrecondition, match=r"initdb failed"):
        embedded.initdb(tmp_path, password="secret-word")
    assert (tmp_path / "mine.txt").read_text() == "mine"


def test_account_that_cannot_reach_the_home_is_told_which_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pwd

    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    monkeypatch.setattr(embedded, "_ensure_account", lambda: None)
    monkeypatch.setattr(embedded, "POSTGRES_ACCOUNT", pwd.getpwuid(0).pw_name)
    for folder in tmp_path.parents:
        if not folder.stat().st_mode & 0o001:
            closed = folder  # pytest's own folders come first on the way
    with pytest.raises(FailedPrecondition, match="cannot pass this folder") as caught:
        embedded._give_to_account(tmp_path / "closed" / "data")
    assert Path(caught.value.fields["path"]) in [*(tmp_path / "closed" / "data").parents]


def test_server_that_cannot_start_says_why_and_is_gone(tmp_path: Path) -> None:
    process = ServerProcess(["/bin/sh", "-c", "echo the disk is full; exit 3"], tmp_path / "log")
    with pytest.raises(Unavailable, match="the disk is full"):
        process.start(lambda: False)
    process.stop()


async def test_nats_keeps_its_streams_over_a_restart(server_dir: Path) -> None:
    server = EmbeddedNats(server_dir)
    await asyncio.to_thread(server.start)
    try:
        client = await nats.connect(server.url)
        await client.jetstream().add_stream(name="S", subjects=["s"])
        await client.jetstream().publish("s", b"x")
        await client.close()
        await asyncio.to_thread(server.stop)
        await asyncio.to_thread(server.start)
        client = await nats.connect(server.url)
        assert (await client.jetstream().stream_info("S")).state.messages == 1
        await client.close()
    finally:
        await asyncio.to_thread(server.stop)


async def test_nats_takes_further_configuration(server_dir: Path) -> None:
    server = EmbeddedNats(server_dir, 'authorization { token: "let-me-in" }')
    await asyncio.to_thread(server.start)
    refused: list[Exception] = []

    async def on_error(error: Exception) -> None:
        refused.append(error)

    try:
        with pytest.raises(nats.errors.Error):
            await nats.connect(server.url, allow_reconnect=False, error_cb=on_error, max_reconnect_attempts=1)
        client = await nats.connect(server.url, token="let-me-in")
        await client.close()
    finally:
        await asyncio.to_thread(server.stop)


@pytest.mark.parametrize("start", [EmbeddedPostgres, EmbeddedNats])
def test_two_servers_side_by_side_do_not_meet(
    tmp_path: Path, start: Callable[[Path], EmbeddedPostgres | EmbeddedNats]
) -> None:
    first, second = start(tmp_path / "1"), start(tmp_path / "2")
    try:
        first.start()
        second.start()
        assert first.port != second.port
        assert first.pid != second.pid
    finally:
        first.stop()
        second.stop()
