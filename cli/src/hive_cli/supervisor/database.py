"""The database of an installation: made, and brought up to date at every start."""

import psycopg
from hive_common.eventlog.genesis import create_log
from hive_common.eventlog.migrate import migrate_log
from hive_common.eventlog.roles import provision
from hive_common.kernel.errors import FailedPrecondition
from hive_common.ops.config import read_secret
from hive_common.ops.embedded import SUPERUSER
from psycopg import sql
from psycopg.conninfo import make_conninfo

from hive_cli.home import Home, Settings
from hive_cli.supervisor import names
from hive_cli.supervisor.network import LOOPBACK, Network
from hive_cli.supervisor.provision import DATABASE, POSTGRES_ADMIN, postgres_secret

CREATE_DATABASE = """CREATE DATABASE {} TEMPLATE template0 ENCODING 'UTF8'
    LOCALE 'C' LOCALE_PROVIDER builtin BUILTIN_LOCALE 'C.UTF-8'"""
"""Whatever the server's own defaults are: without UTF8 text comes back as bytes, and an order of text that the
operating system defines changes with its upgrades."""


def admin_dsn(home: Home, settings: Settings, database: str = DATABASE, network: Network = LOOPBACK) -> str:
    """Return the connection string of the superuser. It holds the password: never log it."""
    return make_conninfo(
        host=network.host(names.POSTGRES),
        port=settings.ports["postgres"],
        dbname=database,
        user=SUPERUSER,
        password=read_secret(home.secret_file(POSTGRES_ADMIN)),
        application_name="hive_supervisor",
    )


async def prepare_database(home: Home, settings: Settings, network: Network = LOOPBACK) -> str:
    """Bring database, log schema, roles and genesis event up to date, and return the log's id. Idempotent.

    Raises:
        FailedPrecondition: somebody made the database with another encoding than UTF8.
    """
    async with await psycopg.AsyncConnection.connect(
        admin_dsn(home, settings, "postgres", network), autocommit=True
    ) as conn:
        exists = await (await conn.execute("SELECT 1 FROM pg_database WHERE datname = %s", (DATABASE,))).fetchone()
        if exists is None:
            await conn.execute(sql.SQL(CREATE_DATABASE).format(sql.Identifier(DATABASE)))
    passwords = {name: read_secret(home.secret_file(postgres_secret(name))) for name in names.SERVICES}
    async with await psycopg.AsyncConnection.connect(
        admin_dsn(home, settings, DATABASE, network), autocommit=True
    ) as conn:
        if (encoding := conn.info.parameter_status("server_encoding")) != "UTF8":
            raise FailedPrecondition(f"database {DATABASE}: its encoding is {encoding}, expected UTF8")
        await migrate_log(conn)
        await provision(conn, passwords)
        return await create_log(conn)
