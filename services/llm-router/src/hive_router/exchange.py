"""`hive.models.v1.Exchange`: many calls of the gateway on one stream."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any, Final

import grpc.aio
import msgspec
from hive_common.kernel.errors import HiveError, body_of
from hive_proto.models.v1 import models_pb2, models_pb2_grpc

from hive_router.models import ModelsServicer

log = logging.getLogger(__name__)

ANSWERS_MAX: Final = 64
"""Parts that wait to be sent; calls wait with theirs then."""


class ExchangeServicer(models_pb2_grpc.ExchangeServicer):
    """`hive.models.v1.Exchange`.

    Args:
        models: makes the calls.
    """

    def __init__(self, models: ModelsServicer) -> None:
        self._models = models

    async def Calls(
        self,
        requests: AsyncIterator[models_pb2.ExchangeRequest],
        context: grpc.aio.ServicerContext[Any, Any],
    ) -> AsyncIterator[models_pb2.ExchangeResponse]:
        """Make the calls that come. All of them are cancelled when the stream ends."""
        answers: asyncio.Queue[models_pb2.ExchangeResponse | None] = asyncio.Queue(ANSWERS_MAX)
        running: dict[str, asyncio.Task[None]] = {}
        reader = asyncio.create_task(self._read(requests, answers, running))
        try:
            while (answer := await answers.get()) is not None:
                yield answer
        finally:
            tasks = [reader, *running.values()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _read(
        self,
        requests: AsyncIterator[models_pb2.ExchangeRequest],
        answers: asyncio.Queue[models_pb2.ExchangeResponse | None],
        running: dict[str, asyncio.Task[None]],
    ) -> None:
        try:
            async for request in requests:
                if request.cancel:
                    if (task := running.get(request.cancel)) is not None:
                        task.cancel()
                    continue
                call_id = request.call.call_id
                task = asyncio.create_task(self._make(request, answers))
                running[call_id] = task
                task.add_done_callback(lambda _, call_id=call_id: running.pop(call_id, None))  # type: ignore[misc]
        finally:
            # Whoever reads the answers ends too; where it is full nobody does any more.
            with contextlib.suppress(asyncio.QueueFull):
                answers.put_nowait(None)

    async def _make(
        self,
        request: models_pb2.ExchangeRequest,
        answers: asyncio.Queue[models_pb2.ExchangeResponse | None],
    ) -> None:
        call_id, is_whole = request.call.call_id, False
        try:
            async with contextlib.aclosing(self._models.parts(request.call, request.deadline_ms / 1000)) as parts:
                async for part in parts:
                    is_whole = part.head.whole
                    await answers.put(models_pb2.ExchangeResponse(call_id=call_id, part=part, last=is_whole))
            if not is_whole:
                await answers.put(models_pb2.ExchangeResponse(call_id=call_id, last=True))
        except Exception as error:
            if not isinstance(error, HiveError):
                log.exception("call %s failed", call_id)
            told = msgspec.json.encode(body_of(error), enc_hook=str)
            await answers.put(models_pb2.ExchangeResponse(call_id=call_id, error_json=told, last=True))
