"""One HTTP call on its way to the services behind: who calls, and whether they are still there."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from typing import Annotated, Any, TypeVar

import grpc.aio
from fastapi import Depends, Request
from starlette.requests import ClientDisconnect
from starlette.types import Receive

from hive_gateway.keys import Caller
from hive_gateway.middleware import CALLER
from hive_gateway.peers import STREAM_S, UNARY_S, Peer

Q = TypeVar("Q")
R = TypeVar("R")


async def disconnected(receive: Receive) -> None:
    """Return when the client of an ASGI call has gone. The body MUST have been read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


class Upstream:
    """Calls to peers in the name of whoever made the HTTP call.

    Starlette lets a handler run on when its client goes away, and the work behind it too; here it is cancelled.
    """

    def __init__(self, caller: Caller, receive: Receive) -> None:
        self.caller = caller
        self._receive = receive

    async def ask(
        self,
        peer: Peer,
        method: grpc.aio.UnaryUnaryMultiCallable[Q, R],
        message: Q,
        timeout_s: float = UNARY_S,
    ) -> R:
        """Make a unary call; it ends when the client goes away.

        Raises:
            HiveError: what the peer says, or that it cannot be reached.
            ClientDisconnect: nobody waits for the answer any more.
        """
        return await self.while_connected(peer.ask(method, message, self.caller, timeout_s))

    def stream(
        self,
        peer: Peer,
        method: grpc.aio.UnaryStreamMultiCallable[Q, R],
        message: Q,
        timeout_s: float = STREAM_S,
    ) -> AsyncGenerator[R, None]:
        """Iterate a server stream; whoever iterates watches the client. Raises as `Peer.stream`."""
        return peer.stream(method, message, self.caller, timeout_s)

    async def while_connected(self, work: Coroutine[Any, Any, R]) -> R:
        """Await `work`, and cancel it when the client goes away. Raises ClientDisconnect then."""
        task = asyncio.create_task(work)
        gone = asyncio.create_task(disconnected(self._receive))
        try:
            await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientDisconnect
            return task.result()
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)


async def _upstream(request: Request) -> Upstream:
    # FastAPI runs dependencies that are not async in threads.
    return Upstream(request.scope[CALLER], request.receive)


UpstreamDep = Annotated[Upstream, Depends(_upstream)]
"""FastAPI parameter: the `Upstream` of the call."""
