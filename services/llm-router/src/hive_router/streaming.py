"""Answers on their way from a back end to whoever asked."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

from hive_common.inference.calls import Answer
from hive_common.inference.errors import error_event
from hive_common.inference.tally import raise_error_of
from hive_common.kernel.errors import (
    BudgetExhausted,
    DeadlineExceeded,
    HiveError,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    Unavailable,
)

from hive_router.flight import CANCELLED, Flight

ANSWER_BYTES_MAX: Final = 64 * 1024 * 1024
"""An answer that is no stream is gathered before it begins, so that one that breaks off is an error of the call."""

PIECE_BYTES_MAX: Final = 4 * 1024 * 1024
"""A message of gRPC has 16 MiB at most, and what holds one holds all of it."""


class Stream(AsyncGenerator[bytes, None]):
    """The events of a stream. It ends in `[DONE]` or an error, and gives its place back however it ends.

    A class, since a generator function that was never begun would run no `finally`.

    Args:
        flight: the call.
        first: its first events.
        source: of the others.
        ended: is told, once, whether the back end did what it should, and the code of the error.
    """

    __slots__ = (
        "_ended",
        "_first",
        "_flight",
        "_is_late",
        "_over",
        "_source",
        "_timer",
        "_waiting",
        "_was_cancelled",
    )

    def __init__(
        self,
        flight: Flight,
        first: bytes,
        source: AsyncGenerator[bytes, None],
        ended: Callable[[bool | None, str], None],
    ) -> None:
        self._first: bytes | None = first
        self._flight = flight
        self._ended = ended
        self._source = source
        self._over = self._is_late = self._was_cancelled = False
        self._waiting: asyncio.Task[Any] | None = None
        # One for all of it: `asyncio.timeout_at` around each piece takes more than the piece.
        self._timer = asyncio.get_running_loop().call_at(flight.until, self._late)
        flight.on_stop = self._late

    async def asend(self, value: None, /) -> bytes:
        """Return the next events."""
        tally = self._flight.tally
        while not self._over:
            try:
                piece = await self._next()
            except TimeoutError:
                late = DeadlineExceeded(f"no whole answer within {self._flight.call.deadline_ms} ms")
                error = self._flight.stopped or late
                return await self._broken(error, None)
            except HiveError as error:
                return await self._broken(error, verdict_on(error))
            except BaseException:
                await self.aclose()
                raise
            if piece is None:
                if tally.done or tally.error:
                    await self._finish(tally.done, "" if tally.done else tally.error)
                    break
                return await self._broken(Unavailable("the answer ended before it was whole"), False)
            passed = tally.events(piece)
            if passed:
                return passed
        raise StopAsyncIteration

    async def _next(self) -> bytes | None:
        first, self._first = self._first, None
        if first is not None:
            return first
        task = asyncio.current_task()
        assert task is not None
        before, self._waiting = task.cancelling(), task
        try:
            if self._is_late:
                raise TimeoutError
            return await anext(self._source, None)
        except BaseException as error:
            # As `asyncio.Timeout` does: where somebody else cancelled as well, that one is to be obeyed.
            if self._was_cancelled and task.uncancel() <= before and isinstance(error, asyncio.CancelledError):
                raise TimeoutError from None
            raise
        finally:
            self._waiting = None

    def _late(self) -> None:
        if self._is_late:
            return
        self._is_late = True
        if self._waiting is not None:
            self._was_cancelled = True
            self._waiting.cancel()

    async def athrow(self, *exception: Any) -> bytes:
        """End the stream with an exception."""
        await self.aclose()
        raise exception[1] if len(exception) > 1 and exception[1] is not None else exception[0]

    async def aclose(self) -> None:
        """Cancel the generation, if it goes on."""
        await self._finish(None, CANCELLED)

    async def _broken(self, error: HiveError, verdict: bool | None) -> bytes:
        event = error_event(error)
        self._flight.tally.events(event)
        await self._finish(verdict, error.code)
        return event

    async def _finish(self, verdict: bool | None, code: str) -> None:
        if self._over:
            return
        self._over = True
        self._timer.cancel()
        self._flight.on_stop = None
        tally = self._flight.tally
        if code == CANCELLED and (tally.done or tally.error):
            # Its last event has gone out; whoever stops reading after it has the whole answer.
            verdict, code = tally.done, "" if tally.done else tally.error
        try:
            await self._source.aclose()
        finally:
            self._ended(verdict, code)


async def begun(answer: Answer) -> bytes:
    """Return the first events of a stream. Raises the error that it begins with."""
    try:
        first = await anext(answer.chunks, None)
        if first is None:
            raise Unavailable("the answer ended before it began")
        if b'"error"' in first:
            raise_error_of(first)
    except BaseException:
        await answer.chunks.aclose()
        raise
    return first


async def gathered(answer: Answer) -> bytes:
    """Return all of an answer that is no stream. Raises PayloadTooLarge, and what its chunks raise."""
    parts: list[bytes] = []
    size = 0
    try:
        async for part in answer.chunks:
            size += len(part)
            if size > ANSWER_BYTES_MAX:
                raise PayloadTooLarge(f"the answer is longer than {ANSWER_BYTES_MAX} bytes")
            parts.append(part)
    finally:
        await answer.chunks.aclose()
    return parts[0] if len(parts) == 1 else b"".join(parts)


async def pieces(body: bytes) -> AsyncGenerator[bytes, None]:
    """Yield a body in pieces that fit into messages."""
    for start in range(0, len(body), PIECE_BYTES_MAX):
        yield body[start : start + PIECE_BYTES_MAX]


def verdict_on(error: HiveError) -> bool | None:
    """Whether an error speaks for or against the back end: True where it answered as it should."""
    if isinstance(error, InvalidArgument | NotFound):
        return True
    return None if isinstance(error, DeadlineExceeded | RateLimited | BudgetExhausted) else False
