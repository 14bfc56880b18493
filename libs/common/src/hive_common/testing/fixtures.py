"""Pytest fixtures around real servers. Loaded by every test run through the entry point `pytest11`.

`postgres_server`, `nats_server`   one per session, from wheels, or in containers with HIVE_TEST_SERVERS=containers
`database`                          a new database per test: the log migrated and begun, roles provisioned
`empty_database`                    a new database per test with nothing in it
`scripted`                          a back end for model calls, per test, in this process
"""

import asyncio
import itertools
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeAlias

import psycopg
import pytest

from hive_common.bus.authority import Authority
from hive_common.testing.containers import ContainerNats, ContainerPostgres, engine_problem
from hive_common.testing.nats import EmbeddedNats
from hive_common.testing.postgres import EmbeddedPostgres, PostgresServer
from hive_common.testing.scripted.server import ScriptedBackEnd

NatsServer: TypeAlias = EmbeddedNats | ContainerNats
TEMPLATE = "hive_template"
_SETTINGS = {"fsync": "off"}
"""Of the server of a session: no test of it cuts the power, and dropping a database takes a fifth of the time."""
_numbers = itertools.count(1)


class Database:
    """One database of a test.

    Attributes:
        dsn: of the superuser.
        log_id: of the log in it; empty in an empty database.
    """

    def __init__(self, server: PostgresServer, name: str, passwords: dict[str, str], log_id: str = "") -> None:
        self.server = server
        self.name = name
        self.log_id = log_id
        self._passwords = passwords

    @property
    def dsn(self) -> str:
        """Connection string of the superuser."""
        return self.server.dsn(self.name)

    def role_dsn(self, service: str) -> str:
        """Return the connection string of a service's role, such as `scheduler` for `hive_scheduler`."""
        service = service.removeprefix("hive_")
        return self.server.dsn(self.name, user=f"hive_{service}", password=self._passwords[service])


def servers() -> str:
    """Return what the fixtures start: `embedded`, or `containers`. Skips where there is no engine for those."""
    kind = os.environ.get("HIVE_TEST_SERVERS", "embedded")
    assert kind in ("embedded", "containers"), f"HIVE_TEST_SERVERS={kind}: expected embedded or containers"
    problem = engine_problem() if kind == "containers" else None
    if problem is not None:
        pytest.skip(f"HIVE_TEST_SERVERS=containers: {problem}")
    return kind


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A running PostgreSQL of this session."""
    in_container = servers() == "containers"
    folder = tmp_path_factory.mktemp("postgres")
    server = ContainerPostgres() if in_container else EmbeddedPostgres(folder, _SETTINGS)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def nats_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServer]:
    """A running NATS server of this session, JetStream on; its `issuer` makes credentials for it."""
    in_container = servers() == "containers"
    authority = Authority.new()
    if in_container:
        server: NatsServer = ContainerNats(authority)
    else:
        server = EmbeddedNats(tmp_path_factory.mktemp("nats"), authority=authority)
    server.start()
    yield server
    server.stop()


@pytest.fixture(scope="session")
def log_template(postgres_server: PostgresServer) -> Database:
    """The database that `database` copies: migrating once and copying takes a tenth of migrating each time."""
    from hive_common.eventlog.roles import SERVICES

    passwords = {service: secrets.token_urlsafe(18) for service in SERVICES}
    postgres_server.create_database(TEMPLATE)
    with ThreadPoolExecutor(1) as pool:
        log_id = pool.submit(asyncio.run, _prepare(postgres_server.dsn(TEMPLATE), passwords)).result()
    return Database(postgres_server, TEMPLATE, passwords, log_id)


async def _prepare(dsn: str, passwords: dict[str, str]) -> str:
    from hive_common.eventlog.genesis import create_log
    from hive_common.eventlog.migrate import migrate_log
    from hive_common.eventlog.roles import provision

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as conn:
        await migrate_log(conn)
        await provision(conn, passwords)
        return await create_log(conn)


@pytest.fixture
def database(postgres_server: PostgresServer, log_template: Database) -> Iterator[Database]:
    """A new database whose log holds its genesis event only."""
    name = f"hive_test_{next(_numbers)}"
    postgres_server.create_database(name, template=TEMPLATE)
    yield Database(postgres_server, name, log_template._passwords, log_template.log_id)
    postgres_server.drop_database(name)


@pytest.fixture
def empty_database(postgres_server: PostgresServer) -> Iterator[Database]:
    """A new database with nothing in it."""
    name = f"hive_test_{next(_numbers)}"
    postgres_server.create_database(name)
    yield Database(postgres_server, name, {})
    postgres_server.drop_database(name)


@pytest.fixture
def server_dir(tmp_path: Path) -> Path:
    """A folder for a server that one test starts for itself."""
    folder = tmp_path / "server"
    folder.mkdir()
    return folder


@pytest.fixture
async def scripted() -> AsyncIterator[ScriptedBackEnd]:
    """A back end that plays 16 numbered tokens at once, until `play` says otherwise."""
    async with ScriptedBackEnd() as back_end:
        yield back_end
