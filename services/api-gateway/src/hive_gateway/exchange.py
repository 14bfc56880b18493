"""Calls to the router whose answers are whole, on one stream: a gRPC call for each takes longer than all else."""

import asyncio
from typing import Any

import grpc.aio
import msgspec
from hive_common.inference.calls import Head
from hive_common.kernel.errors import ErrorBody, HiveError, Unavailable
from hive_proto.models.v1 import models_pb2, models_pb2_grpc

from hive_gateway.peers import Peer

_Requests = asyncio.Queue[models_pb2.ExchangeRequest]


class _Pending:
    """A call that waits for its answer."""

    __slots__ = ("chunks", "done", "head")

    def __init__(self) -> None:
        self.head = Head(0, "")
        self.chunks: list[bytes] = []
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def take(self, part: models_pb2.CompleteResponse) -> None:
        """Take a part of the answer."""
        if part.WhichOneof("part") == "head":
            head = part.head
            self.head = Head(head.status, head.content_type, head.route, head.executor)
            self.chunks.append(head.chunk)
        else:
            self.chunks.append(part.chunk)


class Exchange:
    """The stream to the router. It is opened by a call that needs it, and after it broke by the next one.

    Args:
        router: who answers.
    """

    def __init__(self, router: Peer) -> None:
        self._router = router
        self._stub = models_pb2_grpc.ExchangeStub(router.channel)
        self._pending: dict[str, _Pending] = {}
        self._requests: _Requests = asyncio.Queue()
        self._reader: asyncio.Task[None] | None = None

    async def whole(self, call: models_pb2.CompleteRequest, deadline_ms: int) -> tuple[Head, list[bytes]]:
        """Make a call; its head, and its body in pieces. Being cancelled cancels it at the router.

        Raises:
            HiveError: what the router says, or that it cannot be reached.
        """
        requests = self._open()
        pending = self._pending[call.call_id] = _Pending()
        requests.put_nowait(models_pb2.ExchangeRequest(call=call, deadline_ms=deadline_ms))
        try:
            await pending.done
        except asyncio.CancelledError:
            # On a stream that broke meanwhile nobody reads it, and nobody has to.
            requests.put_nowait(models_pb2.ExchangeRequest(cancel=call.call_id))
            raise
        finally:
            self._pending.pop(call.call_id, None)
        return pending.head, pending.chunks

    async def close(self) -> None:
        """End the stream, and what waits on it."""
        if self._reader is not None:
            self._reader.cancel()
            await asyncio.gather(self._reader, return_exceptions=True)

    def _open(self) -> _Requests:
        if self._reader is None or self._reader.done():
            stream = self._stub.Calls(metadata=self._router.metadata(None))
            self._requests = asyncio.Queue()
            self._reader = asyncio.create_task(self._read(stream, self._requests), name="exchange with the router")
        return self._requests

    async def _read(self, stream: Any, requests: _Requests) -> None:
        error: HiveError = Unavailable(f"the {self._router.name} cannot be reached now", peer=self._router.name)
        # A write that is cancelled cancels all of the stream: only this task's end does that.
        writer = asyncio.create_task(self._write(stream, requests), name="calls to the router")
        try:
            while (message := await stream.read()) is not grpc.aio.EOF:
                self._took(message)
        except grpc.aio.AioRpcError as failure:
            error = self._router.error(failure)
        finally:
            writer.cancel()
            stream.cancel()
            waiting, self._pending = self._pending, {}
            for pending in waiting.values():
                if not pending.done.done():
                    pending.done.set_exception(error)

    async def _write(self, stream: Any, requests: _Requests) -> None:
        try:
            while True:
                await stream.write(await requests.get())
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            # It broke: whoever reads it hears of it, too.
            stream.cancel()

    def _took(self, message: models_pb2.ExchangeResponse) -> None:
        pending = self._pending.get(message.call_id)
        if pending is None or pending.done.done():
            return
        if message.error_json:
            pending.done.set_exception(msgspec.json.decode(message.error_json, type=ErrorBody).raised())
            return
        if message.HasField("part"):
            pending.take(message.part)
        if message.last:
            pending.done.set_result(None)
