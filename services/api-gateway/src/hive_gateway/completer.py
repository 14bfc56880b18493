"""Model calls on their way to the router."""

from collections.abc import AsyncGenerator
from typing import Any, Final

import grpc.aio
from hive_common.inference.calls import Head, ModelCall, OfferedModel
from hive_common.kernel.errors import Internal, Unavailable
from hive_proto.models.v1 import models_pb2

from hive_gateway.exchange import Exchange
from hive_gateway.peers import UNARY_S, Peers

MODELS_MAX: Final = 1_000
_SLACK_S: Final = 1.0
"""The router ends a call at its deadline and says why; this is for a router that does not."""


class RoutedAnswer:
    """An answer as the router streams it."""

    def __init__(self, head: Head, chunks: AsyncGenerator[bytes, None]) -> None:
        self.head = head
        self.chunks = chunks


class RouterCompleter:
    """A `Completer` that asks the router.

    Args:
        peers: with the router among them.
    """

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._exchange = Exchange(peers.router)

    async def close(self) -> None:
        """End what is under way."""
        await self._exchange.close()

    async def complete(self, call: ModelCall) -> RoutedAnswer:
        """Begin a call; raises as the port says."""
        router = self._peers.router
        message = models_pb2.CompleteRequest(
            call_id=call.id,
            endpoint=call.endpoint,
            model=call.model,
            body=call.body,
            stream=call.stream,
            caller=call.caller,
            key=call.key,
            pin=call.pin,
            counts_only=call.counts_only,
            cloud=call.cloud,
        )
        if not call.stream:
            whole, pieces = await self._exchange.whole(message, call.deadline_ms)
            return RoutedAnswer(whole, _pieces(pieces))
        timeout_s = call.deadline_ms / 1000 + _SLACK_S
        rpc = self._peers.models.Complete(message, timeout=timeout_s, metadata=router.metadata(None))
        try:
            first = await rpc.read()
        except grpc.aio.AioRpcError as error:
            raise router.error(error) from error
        except BaseException:
            rpc.cancel()
            raise
        if not isinstance(first, models_pb2.CompleteResponse):
            raise Unavailable("the router ended the call without an answer")
        if first.WhichOneof("part") != "head":
            rpc.cancel()
            raise Internal("the router began an answer without its head")
        head = first.head
        return RoutedAnswer(
            Head(head.status, head.content_type, head.route, head.executor), self._chunks(rpc, head.chunk)
        )

    async def _chunks(self, rpc: Any, first: bytes) -> AsyncGenerator[bytes, None]:
        try:
            if first:
                yield first
            while (message := await rpc.read()) is not grpc.aio.EOF:
                yield message.chunk
        except grpc.aio.AioRpcError as error:
            raise self._peers.router.error(error) from error
        finally:
            # Does nothing to a call that is done; the router cancels what is under way.
            rpc.cancel()

    async def models(self) -> list[OfferedModel]:
        """Return what can be called at present; raises as the port says."""
        message = models_pb2.ListRequest(limit=MODELS_MAX)
        listed = await self._peers.router.ask(self._peers.models.List, message, None, UNARY_S)
        return [
            OfferedModel(
                name=model.name,
                backend="",
                family=model.family,
                size_bytes=model.size_bytes,
                quantisation=model.quantisation,
                context_tokens=model.context_tokens,
                loaded=model.loaded,
                executors=tuple(model.executors),
                providers=tuple(model.providers),
            )
            for model in listed.models
        ]


async def _pieces(pieces: list[bytes]) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece
