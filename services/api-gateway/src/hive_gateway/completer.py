"""Model calls on their way to the router."""

from collections.abc import AsyncGenerator
from typing import Final

from hive_common.inference.calls import Head, ModelCall, OfferedModel
from hive_proto.models.v1 import models_pb2

from hive_gateway.exchange import Exchange
from hive_gateway.peers import UNARY_S, Peers

MODELS_MAX: Final = 1_000


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
        head, chunks = await self._exchange.begin(message, call.deadline_ms)
        return RoutedAnswer(head, chunks)

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
