"""The router's view: which executor serves which model."""

from collections.abc import Sequence
from typing import Any, Final

import msgspec
from hive_common.contracts.events import ExecutorCapabilitiesChanged, ExecutorRegistered, Model, decode
from hive_common.eventlog.log import Stored
from hive_common.kernel.errors import CorruptLog, UnknownEvent
from hive_common.ops.database import Database
from psycopg import AsyncConnection

SCHEMA: Final = "router"
EXECUTORS_MAX: Final = 1_000
"""Executors named for one model in a list."""

_FORGET = """
DELETE FROM router.executor_models m USING unnest(%s::text[], %s::text[]) AS reported (ns, executor)
WHERE m.ns = reported.ns AND m.executor = reported.executor
"""
_REPORT = """
INSERT INTO router.executor_models
    (ns, executor, owner, name, backend, family, size_bytes, quantisation, context_tokens, loaded)
VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s, %s)
"""
_LIST = """
SELECT name, (array_agg(DISTINCT executor ORDER BY executor))[1:%s], max(family), max(size_bytes),
       max(quantisation), max(context_tokens), bool_or(loaded)
FROM router.executor_models WHERE ns = %s GROUP BY name ORDER BY name LIMIT %s
"""


class ModelRow(msgspec.Struct, frozen=True):
    """A model of the pool. Where executors disagree about it, sizes are the largest that is reported."""

    name: str
    executors: list[str]
    family: str
    size_bytes: int
    quantisation: str
    context_tokens: int
    loaded: bool


class ModelsProjection:
    """Keeps the view up to date (`hive_common.eventlog.projection.Projection`)."""

    name = "models"
    types: Sequence[str] | None = ("ExecutorRegistered", "ExecutorCapabilitiesChanged")

    async def apply(self, conn: AsyncConnection[Any], batch: Sequence[Stored]) -> None:
        """Replace the models of every executor in `batch` by those it reported last."""
        reported = {(stored.ns, stored.stream): (stored.owner, _models_of(stored)) for stored in batch}
        if not reported:
            return
        async with conn.cursor() as cursor:
            await cursor.execute(_FORGET, ([ns for ns, _ in reported], [executor for _, executor in reported]))
            await cursor.executemany(
                _REPORT,
                [(*key, owner, *_columns(model)) for key, (owner, models) in reported.items() for model in models],
            )


def _models_of(stored: Stored) -> list[Model]:
    if stored.payload is None:
        raise CorruptLog(f"the payload at position {stored.position} is missing", position=stored.position)
    event = decode(stored.type, stored.schema, stored.payload)
    match event:
        case ExecutorRegistered() | ExecutorCapabilitiesChanged():
            # A back end may list a model twice; the last one counts.
            return list({(model.name, model.backend): model for model in event.capabilities.models}.values())
    raise UnknownEvent(f"position {stored.position}: the router does not know {stored.type}")


def _columns(model: Model) -> tuple[Any, ...]:
    return (
        model.name,
        model.backend,
        model.family,
        model.size_bytes,
        model.quantisation,
        model.context_tokens,
        model.loaded,
    )


class Views:
    """Reads of one namespace.

    Args:
        database: of the service.
        ns: the namespace.
    """

    def __init__(self, database: Database, ns: str) -> None:
        self._database = database
        self._ns = ns

    async def models(self, limit: int) -> list[ModelRow]:
        """Return the models of the pool in order of their names."""
        rows = await self._database.fetch(_LIST, (EXECUTORS_MAX, self._ns, limit))
        return [ModelRow(*row) for row in rows]
