"""The gRPC service `hive.audit.v1.Audit`."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, Final

import grpc.aio
from hive_common.artifacts.store import ArtifactStore
from hive_common.kernel.clock import Clock, iso
from hive_common.kernel.errors import InvalidArgument, RateLimited
from hive_proto.audit.v1 import audit_pb2, audit_pb2_grpc

from hive_audit.checks import export_log, verify_log
from hive_audit.decision_checks import DecisionCheck, check_decision, decisions
from hive_audit.log_source import LogSource
from hive_audit.verifier import Head, Row

Context = grpc.aio.ServicerContext[Any, Any]

CHECKS_MAX: Final = 2
READS_MAX: Final = 16
"""Calls at a time; each holds a connection. One more is refused, not queued: its caller can come again."""
EVENTS_DEFAULT: Final = 1_000
EVENTS_MAX: Final = 10_000
HASH_BYTES: Final = 32
DECISIONS_DEFAULT: Final = 50
DECISIONS_MAX: Final = 200


class _Places:
    """A bounded number of calls, each with its own connection to the log."""

    def __init__(self, open_source: Callable[[], Awaitable[LogSource]], places: int, what: str) -> None:
        self._open_source = open_source
        self._places = asyncio.Semaphore(places)
        self._what = what

    async def take(self) -> LogSource:
        """Return a connection. `give` it back."""
        if self._places.locked():
            raise RateLimited(f"too many {self._what} at a time; try again later")
        await self._places.acquire()
        try:
            return await self._open_source()
        except BaseException:
            self._places.release()
            raise

    async def give(self, source: LogSource) -> None:
        """Close a connection and make room."""
        try:
            await source.close()
        finally:
            self._places.release()


class AuditService(audit_pb2_grpc.AuditServicer):
    """Verify, Events, Export and Decisions over connections of their own.

    Args:
        open_source: connects to the log.
        clock: for the time in exports.
        store: of blobs, which are only read.
    """

    def __init__(self, open_source: Callable[[], Awaitable[LogSource]], clock: Clock, store: ArtifactStore) -> None:
        self._checks = _Places(open_source, CHECKS_MAX, "verifications and exports")
        self._reads = _Places(open_source, READS_MAX, "readers of events")
        self._clock = clock
        self._store = store

    async def Verify(self, request: audit_pb2.VerifyRequest, context: Context) -> audit_pb2.VerifyResponse:
        """Check the whole log."""
        against = _against(request)
        source = await self._checks.take()
        try:
            result = await verify_log(source, against)
        finally:
            await self._checks.give(source)
        return audit_pb2.VerifyResponse(
            ok=result.ok,
            events=result.events,
            head=result.head,
            head_hash=bytes.fromhex(result.head_hash),
            first_bad_position=result.first_bad_position,
            reason=result.reason,
            log_id=result.log_id,
        )

    async def Events(self, request: audit_pb2.EventsRequest, context: Context) -> AsyncIterator[audit_pb2.Event]:
        """Stream events by position."""
        after = getattr(request, "from") or 1
        limit = request.limit or EVENTS_DEFAULT
        if after < 1 or request.to < 0 or not 1 <= limit <= EVENTS_MAX:
            raise InvalidArgument(
                f"from: {after}, to: {request.to}, limit: {limit}; "
                f"expected positions, and a limit of 1 to {EVENTS_MAX}"
            )
        source = await self._reads.take()
        try:
            head = await source.head()
            until = request.to or (head.position if head else 0)
            after -= 1
            while limit > 0 and (rows := await source.page(after, until, min(limit, 500))):
                for row in rows:
                    yield _event(row)
                after, limit = rows[-1][0], limit - len(rows)
        finally:
            await self._reads.give(source)

    async def Export(
        self, request: audit_pb2.ExportRequest, context: Context
    ) -> AsyncIterator[audit_pb2.ExportChunk]:
        """Stream the export file, verifying it on the way."""
        source = await self._checks.take()
        try:
            async for lines in export_log(source, request.to, iso(self._clock.now_us())):
                yield audit_pb2.ExportChunk(lines=lines)
        finally:
            await self._checks.give(source)

    async def Decisions(self, request: audit_pb2.DecisionsRequest, context: Context) -> audit_pb2.DecisionsResponse:
        """Check decisions again."""
        limit = request.limit or DECISIONS_DEFAULT
        if not 1 <= limit <= DECISIONS_MAX or request.after < 0 or (request.task_id and request.job_id):
            raise InvalidArgument(
                f"expected task_id or job_id, a position, and a limit of 1 to {DECISIONS_MAX}", path="limit"
            )
        source = await self._checks.take()
        try:
            if request.task_id:
                checks = [await check_decision(source, self._store, request.task_id)]
            else:
                found = decisions(source, self._store, request.job_id, request.after, limit)
                checks = [check async for check in found]
        finally:
            await self._checks.give(source)
        more = not request.task_id and len(checks) == limit
        return audit_pb2.DecisionsResponse(
            checks=[_decision(check) for check in checks], next_after=checks[-1].position if more else 0
        )


def _decision(check: DecisionCheck) -> audit_pb2.DecisionCheck:
    return audit_pb2.DecisionCheck(
        task_id=check.task,
        job_id=check.job,
        step=check.step,
        position=check.position,
        outcome=check.outcome,
        result=check.result,
        reasons=check.reasons,
    )


def _against(request: audit_pb2.VerifyRequest) -> Head | None:
    if request.against_position == 0 and not request.against_hash:
        return None
    if request.against_position < 1 or len(request.against_hash) != HASH_BYTES:
        raise InvalidArgument(
            f"against_position: {request.against_position} with a hash of {len(request.against_hash)} bytes; "
            f"expected a position from 1 and its hash of {HASH_BYTES} bytes",
            path="against_position",
        )
    return Head(request.against_position, request.against_hash)


def _event(row: Row) -> audit_pb2.Event:
    position, _, _, _, envelope, hash_, payload, salt = row
    return audit_pb2.Event(
        position=position,
        event_json=envelope,
        hash=hash_,
        payload=payload or b"",
        salt=salt or b"",
        erased=payload is None,
    )
