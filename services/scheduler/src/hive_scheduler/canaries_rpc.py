"""The scheduler's gRPC service Canaries (proto/hive_proto/canaries/v1/canaries.proto)."""

from typing import Any

from hive_proto.canaries.v1 import canaries_pb2, canaries_pb2_grpc

from hive_scheduler.canaries import Canaries
from hive_scheduler.domain.canaries import Canary


class CanariesService(canaries_pb2_grpc.CanariesServicer):
    """hive.canaries.v1.Canaries."""

    def __init__(self, canaries: Canaries) -> None:
        self._canaries = canaries

    async def Add(self, request: canaries_pb2.AddRequest, context: Any) -> canaries_pb2.Canary:
        """Commit a canary and answer."""
        return _message(
            await self._canaries.add(
                request.agent, request.input_json, request.answer_json, request.equal, request.caller
            )
        )

    async def List(self, request: canaries_pb2.ListRequest, context: Any) -> canaries_pb2.ListResponse:
        """Return canaries by agent."""
        return canaries_pb2.ListResponse(canaries=map(_message, self._canaries.all(request.agent)))

    async def Remove(self, request: canaries_pb2.RemoveRequest, context: Any) -> canaries_pb2.Canary:
        """Commit that one is given to nobody any more, and answer."""
        return _message(await self._canaries.remove(request.canary_id, request.caller), removed=True)


def _message(canary: Canary, removed: bool = False) -> canaries_pb2.Canary:
    return canaries_pb2.Canary(
        canary_id=canary.id,
        agent=canary.agent,
        input_json=canary.input,
        equal=canary.equal,
        key=canary.key,
        removed=removed,
    )
