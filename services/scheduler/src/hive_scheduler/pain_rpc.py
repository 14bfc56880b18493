"""The scheduler's gRPC service Pain: failures in groups (proto/hive_proto/pain/v1/pain.proto)."""

import re
from typing import Any, Final

from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.fingerprints import FINGERPRINT_CHARACTERS
from hive_proto.pain.v1 import pain_pb2, pain_pb2_grpc

from hive_scheduler.failure_groups import Failures, Row, message_of

GROUPS_DEFAULT: Final = 20
GROUPS_MAX: Final = 200
EXAMPLES_DEFAULT: Final = 5
EXAMPLES_MAX: Final = 20
_FINGERPRINT: Final = re.compile(rf"[0-9a-f]{{4,{FINGERPRINT_CHARACTERS}}}\Z")


class PainService(pain_pb2_grpc.PainServicer):
    """hive.pain.v1.Pain."""

    def __init__(self, failures: Failures) -> None:
        self._failures = failures

    async def List(self, request: pain_pb2.ListRequest, context: Any) -> pain_pb2.ListResponse:
        """Return groups of failures, those with most first."""
        limit = _within(request.limit, GROUPS_DEFAULT, GROUPS_MAX, "limit")
        position = await self._failures.caught_up()
        rows, truncated = await self._failures.groups(request.since_us, request.agent, limit)
        return pain_pb2.ListResponse(groups=map(_group, rows), position=position, truncated=truncated)

    async def Get(self, request: pain_pb2.GetRequest, context: Any) -> pain_pb2.GetResponse:
        """Return one group, with examples."""
        examples = _within(request.examples, EXAMPLES_DEFAULT, EXAMPLES_MAX, "examples")
        if not _FINGERPRINT.match(request.fingerprint):
            raise InvalidArgument(
                f"fingerprint: {request.fingerprint[:40]!r}, expected 4 to {FINGERPRINT_CHARACTERS} hex digits",
                path="fingerprint",
            )
        await self._failures.caught_up()
        group, rows = await self._failures.group(request.fingerprint, request.since_us, examples)
        return pain_pb2.GetResponse(group=_group(group), examples=map(_example, rows))


def _within(asked: int, default: int, most: int, name: str) -> int:
    if not 0 <= asked <= most:
        raise InvalidArgument(f"{name}: {asked}, expected 1 to {most}", path=name)
    return asked or default


def _group(row: Row) -> pain_pb2.Group:
    fingerprint, agent, code, message, failures, jobs, agents, executors, executor_count = row[:9]
    first_us, last_us, wall_ms, calls, tokens, nano_usd = row[9:]
    return pain_pb2.Group(
        fingerprint=fingerprint,
        agent=agent,
        code=code,
        message=message,
        failures=failures,
        jobs=jobs,
        agents=agents or (),
        executors=executors or (),
        executor_count=executor_count,
        first_us=first_us,
        last_us=last_us,
        wall_ms=wall_ms,
        model_calls=calls,
        tokens=tokens,
        nano_usd=nano_usd,
    )


def _example(row: Row) -> pain_pb2.Example:
    job, task, step, attempt, agent, executor, type_, payload, input_digest, at_us, position, wall_ms = row
    return pain_pb2.Example(
        job_id=job,
        task_id=task,
        step=step,
        attempt=attempt,
        agent=agent,
        executor=executor,
        message=message_of(type_, payload),
        input_digest=input_digest,
        at_us=at_us,
        position=position,
        wall_ms=wall_ms,
    )
