"""A source of bytes that cleans up however it is let go of."""

from abc import abstractmethod
from collections.abc import AsyncGenerator
from typing import Any


class ClosingStream(AsyncGenerator[bytes, None]):
    """Base of streams as classes: a generator function that was never begun would run no `finally`."""

    __slots__ = ()

    @abstractmethod
    async def aclose(self) -> None:
        """Let go of whatever it holds. May be called more than once."""

    async def athrow(self, *exception: Any) -> bytes:
        """End the stream with an exception."""
        await self.aclose()
        raise exception[1] if len(exception) > 1 and exception[1] is not None else exception[0]
