"""Who may do what in the database: one login role and one schema per service, and the log's grants.

Only the services that own aggregates write the log. Nobody but its owner, who cannot log in, can insert
into it past `log_append`.
"""

import contextlib
from typing import Any

from psycopg import AsyncConnection, errors, sql

from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import role_of

WRITERS = ("scheduler", "registry", "router")
READERS = ("audit", "gateway")
SERVICES = WRITERS + READERS


async def provision(admin_conn: AsyncConnection[Any], passwords: dict[str, str]) -> None:
    """Make the role `hive_<service>` and the schema `<service>` of each service, and grant its part of the log.

    Idempotent; sets the passwords anew. The log MUST be migrated before.

    Args:
        admin_conn: an autocommit connection of a superuser.
        passwords: by service; some or all of `SERVICES`.

    Raises:
        InvalidArgument: a service that there is not.
    """
    database = admin_conn.info.dbname
    await admin_conn.execute(sql.SQL("REVOKE ALL ON DATABASE {} FROM PUBLIC").format(sql.Identifier(database)))
    for service, password in passwords.items():
        if service not in SERVICES:
            raise InvalidArgument(f"service {service!r}: expected one of {', '.join(SERVICES)}")
        await _provision_role(admin_conn, role_of(service), password)
        await _provision_grants(admin_conn, service, database)


async def _provision_role(conn: AsyncConnection[Any], role: str, password: str) -> None:
    name = sql.Identifier(role)
    # Roles belong to the cluster; another database of it may have made this one.
    with contextlib.suppress(errors.DuplicateObject, errors.UniqueViolation):
        await conn.execute(sql.SQL("CREATE ROLE {}").format(name))
    # The verifier goes over the wire, not the password, so that no statement log can show it.
    verifier = conn.pgconn.encrypt_password(password.encode(), role.encode(), b"scram-sha-256").decode()
    await conn.execute(
        sql.SQL("ALTER ROLE {} LOGIN NOSUPERUSER NOCREATEDB NOCREATEROLE PASSWORD {}").format(
            name, sql.Literal(verifier)
        )
    )


async def _provision_grants(conn: AsyncConnection[Any], service: str, database: str) -> None:
    role = sql.Identifier(role_of(service))
    log_role = sql.Identifier("hive_log_writer" if service in WRITERS else "hive_log_reader")
    schema = sql.Identifier(service)
    statements = (
        sql.SQL("GRANT CONNECT, TEMPORARY ON DATABASE {} TO {}").format(sql.Identifier(database), role),
        sql.SQL("GRANT {} TO {}").format(log_role, role),
        sql.SQL("CREATE SCHEMA IF NOT EXISTS {} AUTHORIZATION {}").format(schema, role),
    )
    for statement in statements:
        await conn.execute(statement)
