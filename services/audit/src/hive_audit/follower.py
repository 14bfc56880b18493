"""Follows the log and verifies it as it grows. At a break it stops and stays stopped."""

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable
from contextlib import aclosing
from typing import Any, Final

import psycopg
from hive_common.contracts.events import KIND_OF
from hive_common.kernel.errors import HiveError, Unavailable
from hive_common.ops.connection import Connection
from hive_common.ops.log_metrics import LOG_HEAD, PROJECTION_LAG
from prometheus_client import Gauge
from psycopg import AsyncConnection

from hive_audit.checks import learn_streams
from hive_audit.log_source import BEFORE_FIRST, LogSource
from hive_audit.verifier import Break, Head, Row, StreamHeads, Verifier

log = logging.getLogger(__name__)

POLL_S: Final = 1.0
COALESCE_S: Final = 0.2
"""Verification is not urgent; a round at most five times a second leaves the database to the writers."""
BACKOFF_S: Final = 0.5
STREAMS_MAX: Final = 50_000
OTHER_KIND: Final = "other"
"""Types of extensions, which are verified like all others but not known here."""

POSITION = Gauge("hive_audit_position", "Last position that was verified")
BROKEN = Gauge("hive_audit_broken", "1 when the log does not verify")
EVENTS = Gauge("hive_audit_events", "Events verified, by kind", ["kind"])

_LOAD = "SELECT log_id, position, hash FROM audit.progress"
_LOAD_COUNTS = "SELECT kind, events FROM audit.counts ORDER BY kind LIMIT 1000"
_SAVE = """
INSERT INTO audit.progress (log_id, position, hash, broken_position, broken_reason) VALUES (%s, %s, %s, %s, %s)
ON CONFLICT (one_row) DO UPDATE SET (log_id, position, hash, broken_position, broken_reason) =
    (excluded.log_id, excluded.position, excluded.hash, excluded.broken_position, excluded.broken_reason)"""
_COUNT = """
INSERT INTO audit.counts AS c (kind, events) VALUES (%s, %s)
ON CONFLICT (kind) DO UPDATE SET events = c.events + excluded.events"""
# Losing the last rounds only means verifying them again.
_SESSION = "SET synchronous_commit = off"

_RESTORED = "; if an older log was restored on purpose, delete the rows of audit.progress and audit.counts"


class Follower:
    """Verifies what is appended, from where it left off, and keeps how far it is in the schema `audit`.

    Args:
        open_source: connects to the log; called again after the connection was lost.
        open_state: connects as the owner of the schema `audit`, autocommit.
        wake: set when the log has grown.
    """

    def __init__(
        self,
        open_source: Callable[[], Awaitable[LogSource]],
        open_state: Callable[[], Awaitable[AsyncConnection[Any]]],
        wake: asyncio.Event,
    ) -> None:
        self._open_source = open_source
        self._open_state = open_state
        self._wake = wake
        self.position = 0
        self.head = 0
        self.counts: Counter[str] = Counter()
        self.broken: Break | None = None
        self.problem: str | None = "not started"

    async def run(self) -> None:
        """Follow until the log breaks; then return, with `broken` and `problem` set."""
        while self.broken is None:
            try:
                async with await self._open_source() as source, await self._open_state() as state:
                    await state.execute(_SESSION)
                    self.broken = await self._follow(source, state)
            except (HiveError, psycopg.OperationalError) as error:
                self.problem = str(error)
                log.warning("the auditor waits: %s", error)
                await asyncio.sleep(BACKOFF_S)
        self.problem = f"the log does not verify: {self.broken.reason}"
        BROKEN.set(1)
        log.error("%s", self.problem)

    async def _follow(self, source: LogSource, state: AsyncConnection[Any]) -> Break:
        verifier = await self._resume(source, state)
        while verifier.broken is None:
            head = await source.head()
            self._show(verifier, head.position if head else 0)
            if self.head < verifier.position:
                await self._save(state, verifier, (), _cut(self.head, verifier.position))
            else:
                await self._catch_up(source, state, verifier)
            self._show(verifier, self.head)
            if verifier.broken is None:
                self.problem = None
                await self._sleep()
        return verifier.broken

    async def _resume(self, source: LogSource, state: AsyncConnection[Any]) -> Verifier:
        row = await (await state.execute(_LOAD)).fetchone()
        counts = await (await state.execute(_LOAD_COUNTS)).fetchall()
        self.counts = Counter(dict(counts))
        if row is None or row[1] == 0:
            return Verifier(heads=StreamHeads(STREAMS_MAX))
        log_id, position, hash_ = row
        verifier = Verifier(Head(position, hash_), log_id=log_id, heads=StreamHeads(STREAMS_MAX, complete=False))
        found = await source.event_at(position)
        head = await source.head()
        if found is None:
            verifier.broken = _cut(head.position if head else 0, position)
        elif found[1] != hash_:
            verifier.broken = _rewritten(position)
        if verifier.broken is not None:
            await self._save(state, verifier, (), verifier.broken)
        return verifier

    async def _catch_up(self, source: LogSource, state: AsyncConnection[Any], verifier: Verifier) -> None:
        async with aclosing(source.pages(verifier.position or BEFORE_FIRST, self.head)) as pages:
            async for rows in pages:
                await learn_streams(source, verifier.heads, (row[1] for row in rows), rows[0][0] - 1)
                before = verifier.position
                bad = await asyncio.to_thread(verifier.feed, rows)
                verifier.heads.trim()
                await self._save(state, verifier, rows[: verifier.position - before], bad)
                self._show(verifier, self.head)
                if bad is not None:
                    return

    async def _save(
        self, state: AsyncConnection[Any], verifier: Verifier, rows: Iterable[Row], bad: Break | None
    ) -> None:
        verifier.broken = bad
        counts = Counter(KIND_OF.get(row[3], OTHER_KIND) for row in rows)
        broken = (bad.position, bad.reason) if bad is not None else (None, None)
        async with state.transaction():
            await state.execute(_SAVE, (verifier.log_id, verifier.position, verifier.head_hash, *broken))
            for kind, events in counts.items():
                await state.execute(_COUNT, (kind, events))
        self.counts += counts

    def _show(self, verifier: Verifier, head: int) -> None:
        self.head, self.position = head, verifier.position
        POSITION.set(self.position)
        LOG_HEAD.set(head)
        PROJECTION_LAG.labels("audit").set(max(0, head - self.position))
        for kind, events in self.counts.items():
            EVENTS.labels(kind).set(events)

    async def _sleep(self) -> None:
        await asyncio.sleep(COALESCE_S)
        try:
            async with asyncio.timeout(POLL_S):
                await self._wake.wait()
        except TimeoutError:
            return
        self._wake.clear()


def _cut(head: int, verified: int) -> Break:
    return Break(
        head + 1,
        f"position {head + 1} is missing: the log was verified up to {verified}, now it ends at {head}: "
        f"its tail was cut{_RESTORED}",
    )


def _rewritten(position: int) -> Break:
    return Break(
        position,
        f"position {position}: its hash changed since it was verified: the log was rewritten here or before"
        f"{_RESTORED}",
    )


async def connect_state(dsn: str) -> AsyncConnection[Any]:
    """Connect to the schema `audit`.

    Raises:
        Unavailable: Postgres cannot be reached, or refuses.
    """
    try:
        return await Connection.connect(dsn, autocommit=True)
    except psycopg.OperationalError as error:
        raise Unavailable(f"Postgres cannot be reached: {error}") from error
