"""A real PostgreSQL server for tests."""

import secrets
import signal
import time
from pathlib import Path

import psycopg
from psycopg import sql
from psycopg.conninfo import make_conninfo

from hive_common.ops.embedded import SUPERUSER, initdb, postgres_command, postgres_in
from hive_common.ops.ports import free_port
from hive_common.testing.process import ServerProcess

LEFTOVER_S = 10.0
"""How long a start waits for what a killed server left. Whatever is there then is told by the new one."""

_CREATE = """CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'
    LOCALE 'C' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'"""
_COPY = "CREATE DATABASE {} TEMPLATE {}"
_DROP = "DROP DATABASE IF EXISTS {} WITH (FORCE)"


class PostgresServer:
    """A cluster on 127.0.0.1, and what a test does with it as its superuser.

    Attributes:
        port: where clients connect.
        password: of the superuser.
    """

    port: int
    password: str

    def dsn(self, database: str = "postgres", *, user: str = SUPERUSER, password: str | None = None) -> str:
        """Return a connection string; the superuser's unless `user` and `password` are given."""
        return make_conninfo(
            host="127.0.0.1",
            port=self.port,
            dbname=database,
            user=user,
            password=self.password if password is None else password,
        )

    def create_database(self, name: str, *, template: str | None = None) -> None:
        """Create the database `name` as an installation has it, or as a copy of `template`.

        Nobody may be connected to the template.
        """
        if template is None:
            self._execute(sql.SQL(_CREATE).format(sql.Identifier(name)))
        else:
            self._execute(sql.SQL(_COPY).format(sql.Identifier(name), sql.Identifier(template)))

    def drop_database(self, name: str) -> None:
        """Drop the database `name` and throw its sessions out."""
        self._execute(sql.SQL(_DROP).format(sql.Identifier(name)))

    def accepts(self) -> bool:
        """Say whether the server takes connections now."""
        try:
            psycopg.connect(self.dsn(), connect_timeout=2).close()
        except psycopg.OperationalError:
            return False
        return True

    def _execute(self, statement: sql.Composed) -> None:
        with psycopg.connect(self.dsn(), autocommit=True) as conn:
            conn.execute(statement)


class EmbeddedPostgres(PostgresServer):
    """A cluster in `directory`, on a free loopback port, with a random superuser password.

    Args:
        directory: gets `data/` and `postgres.log`.
        settings: server settings on top of the production ones.
    """

    def __init__(self, directory: Path, settings: dict[str, str] | None = None) -> None:
        self.directory = directory
        self.data_dir = directory / "data"
        self.log_file = directory / "postgres.log"
        self.password = secrets.token_urlsafe(18)
        self.port = free_port()
        self._settings = settings
        self._process: ServerProcess | None = None

    @property
    def pid(self) -> int:
        """Process id of the postmaster."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Create the cluster when it is not there yet, start it, and wait until it takes connections."""
        if not (self.data_dir / "PG_VERSION").exists():
            self.directory.mkdir(parents=True, exist_ok=True)
            initdb(self.data_dir, password=self.password)
        until = time.monotonic() + LEFTOVER_S
        while postgres_in(self.data_dir) and time.monotonic() < until:
            time.sleep(0.02)
        command = postgres_command(self.data_dir, port=self.port, settings=self._settings, die_with_parent=True)
        self._process = ServerProcess(command, self.log_file)
        self._process.start(self.accepts)

    def stop(self, with_signal: signal.Signals = signal.SIGINT) -> None:
        """Stop the server: fast shutdown unless another signal is asked for."""
        if self._process is not None:
            self._process.stop(with_signal)
            self._process = None
