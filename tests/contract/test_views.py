"""`ns` and `owner` stand in every view of the log, and its key begins with the namespace."""

from importlib.resources import files

import pytest
from hive_common.ops.migrate import migrate
from hive_common.testing.fixtures import Database
from psycopg import AsyncConnection

MIGRATIONS = {
    "registry": "hive_registry",
    "scheduler": "hive_scheduler",
    "router": "hive_router",
    "audit": "hive_audit",
}
ABOUT_THE_WHOLE_LOG = {
    "scheduler.leadership": "who leads the installation",
    "audit.progress": "how far the one chain is verified, whoever wrote it",
    "audit.counts": "what the verifier has counted on the way",
}
"""Tables of services that are no views of somebody's data; those of every schema are left out below."""

TABLES = """
SELECT c.oid::regclass::text,
       (SELECT array_agg(a.attname::text) FROM pg_attribute a
         WHERE a.attrelid = c.oid AND a.attnum > 0 AND a.attnotnull AND NOT a.attisdropped),
       (SELECT a.attname::text FROM pg_index i JOIN pg_attribute a ON a.attrelid = c.oid AND a.attnum = i.indkey[0]
         WHERE i.indrelid = c.oid AND i.indisprimary)
  FROM pg_class c
 WHERE c.relkind = 'r' AND c.relnamespace = to_regnamespace(%s) AND c.relname NOT IN ('migrations', 'projections')
 ORDER BY 1 LIMIT 1000
"""


@pytest.mark.parametrize("schema", MIGRATIONS)
async def test_every_view_says_whose_its_rows_are(schema: str, database: Database) -> None:
    async with await AsyncConnection.connect(database.role_dsn(schema), autocommit=True) as conn:
        await migrate(conn, files(MIGRATIONS[schema]) / "migrations", schema)
        tables = await (await conn.execute(TABLES, (schema,))).fetchall()
    assert tables
    for table, never_null, first_of_key in tables:
        if table in ABOUT_THE_WHOLE_LOG:
            continue
        assert {"ns", "owner"} <= set(never_null), table
        assert first_of_key == "ns", table
