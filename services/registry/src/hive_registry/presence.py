"""Who pulls at the moment: asked of the scheduler, which is the only one that knows."""

from typing import Final

import grpc.aio
from hive_common.kernel.errors import HiveError
from hive_common.rpc.client import bearer, call, open_channel
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc

PRESENCE_WITHIN_S: Final = 1.0
"""A list of executors is worth more now without their presence than later with it."""


class SchedulerPresence:
    """Presence from the scheduler's leader.

    Args:
        address: `host:port` of the scheduler, or None where the configuration names none.
        key: what services show each other.
    """

    def __init__(self, address: str | None, key: str) -> None:
        self._channel: grpc.aio.Channel | None = None if address is None else open_channel(address)
        self._metadata = bearer(key)

    async def present(self, min_position: int = 0, agents_of: str = "") -> dict[str, executors_pb2.Present] | None:
        """Return presence by executor id, or None where the scheduler cannot be asked now.

        Args:
            min_position: the scheduler answers once it acts by what the log says up to here.
            agents_of: the executor whose records are wanted agent by agent.
        """
        if self._channel is None:
            return None
        stub = executors_pb2_grpc.PresenceStub(self._channel)
        request = executors_pb2.PresenceRequest(min_position=min_position, agents_of=agents_of)
        try:
            answer = await call(stub.List(request, timeout=PRESENCE_WITHIN_S, metadata=self._metadata))
        except HiveError:
            return None
        return {entry.executor_id: entry for entry in answer.executors}

    async def close(self) -> None:
        """Close the channel."""
        if self._channel is not None:
            await self._channel.close()
