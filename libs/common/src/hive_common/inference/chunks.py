"""Answers as numbered chunks on NATS: sent no further ahead than was granted, received without a gap or not at all.

Both ways use it: a device answers the router (`infer`), and the router answers a device (`call.model`).
"""

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from typing import Any, Final

import msgspec

from hive_common.contracts.messages import StreamChunk
from hive_common.inference.calls import Answer, Head
from hive_common.inference.errors import error_event
from hive_common.inference.parts import parts_of
from hive_common.inference.sse import DONE
from hive_common.kernel.errors import HiveError, Unavailable, body_of

CREDIT: Final = 64
"""Chunks that a sender may be ahead of its reader."""

KEEP_ALIVE_S: Final = 15.0
"""After its first chunk a sender that has nothing to say sends an empty one."""

SILENCE_S: Final = 4 * KEEP_ALIVE_S
"""A receiver takes a sender to be lost that says less than that."""

CREDIT_S_MAX: Final = 120.0
"""A sender ends a call whose reader grants nothing for so long."""

BUFFERED_BYTES_MAX: Final = 8 << 20
"""Of one answer that is not read. A sender that is this far ahead floods."""

_encode = msgspec.json.Encoder().encode


class Sender:
    """Sends the answer to one call.

    Args:
        publish: sends one message. Raises HiveError where that is impossible.
        credit: chunks that may be sent before more are granted.
    """

    def __init__(self, publish: Callable[[bytes], Awaitable[None]], credit: int) -> None:
        self._publish = publish
        self._credit = credit
        self._sequence = 0
        self._granted = asyncio.Event()

    def grant(self, credit: int) -> None:
        """Allow so many more chunks."""
        self._credit += max(0, credit)
        self._granted.set()

    async def run(self, begin: Callable[[], Awaitable[Answer]], *, is_stream: bool) -> str:
        """Send the answer, or the error that it is. Return the code of the error; empty where it went well.

        Cancelling it closes the answer, and sends nothing more.
        """
        try:
            answer = await begin()
            try:
                await (self._stream if is_stream else self._whole)(answer)
            finally:
                await answer.chunks.aclose()
        except Exception as error:  # noqa: BLE001 - whatever is raised is told
            await self.fail(error)
            return body_of(error).code
        return ""

    async def fail(self, error: BaseException) -> None:
        """Send an error as the last chunk. It needs no credit, and is lost where nothing can be sent."""
        chunk = StreamChunk(sequence=self._sequence, end=True, error=body_of(error))
        self._sequence += 1
        with contextlib.suppress(HiveError):
            await self._publish(_encode(chunk))

    async def _stream(self, answer: Answer) -> None:
        keeping = asyncio.create_task(self._keep_alive())
        head: Head | None = answer.head
        has_ended = False
        try:
            async for data in answer.chunks:
                has_ended = data.endswith(DONE)
                head = await self._data(head, data, end=has_ended)
            if not has_ended:
                await self._data(head, b"", end=True)
        finally:
            keeping.cancel()

    async def _whole(self, answer: Answer) -> None:
        await self._data(answer.head, b"".join([data async for data in answer.chunks]), end=True)

    async def _data(self, head: Head | None, data: bytes, *, end: bool) -> Head | None:
        try:
            texts = parts_of(data)
        except UnicodeDecodeError as error:
            raise Unavailable(f"the answer of the back end is not UTF-8 at byte {error.start}") from error
        for number, text in enumerate(texts):
            chunk = StreamChunk(
                sequence=self._sequence,
                data=text,
                status=head.status if head else 0,
                content_type=head.content_type if head else "",
                route=head.route if head else "",
                executor=head.executor if head else "",
                end=end and number == len(texts) - 1,
            )
            head = None
            await self._send(chunk)
        return None

    async def _send(self, chunk: StreamChunk) -> None:
        while self._credit < 1:
            self._granted.clear()
            try:
                async with asyncio.timeout(CREDIT_S_MAX):
                    await self._granted.wait()
            except TimeoutError:
                raise Unavailable(f"nobody has read on for {CREDIT_S_MAX:g} s") from None
        if chunk.sequence != self._sequence:
            # A chunk to keep alive went ahead while this one waited.
            chunk = msgspec.structs.replace(chunk, sequence=self._sequence)
        self._credit -= 1
        self._sequence += 1
        await self._publish(_encode(chunk))

    async def _keep_alive(self) -> None:
        while True:
            before = self._sequence
            await asyncio.sleep(KEEP_ALIVE_S)
            if 0 < before == self._sequence and self._credit > 0:
                await self._send(StreamChunk(sequence=self._sequence))


class Receiver(AsyncGenerator[bytes, None]):
    """Receives the answer to one call; its `chunks`, once `begun`.

    A class, since a generator function that was never begun would run no `finally`.

    Args:
        name: who sends, for messages.
        is_stream: pieces that it returns are whole server-sent events.
        first_s: how long nothing may come before the first chunk.
        grant: allows the sender so many more chunks.
        close: is awaited once, whatever way it ends; its argument says whether the sender still sends.
        credit: that the sender was given at the start.
    """

    def __init__(
        self,
        name: str,
        *,
        is_stream: bool,
        first_s: float,
        grant: Callable[[int], Awaitable[None]],
        close: Callable[[bool], Awaitable[None]],
        credit: int = CREDIT,
    ) -> None:
        self._name = name
        self._is_stream = is_stream
        self._silence_s = first_s
        self._grant = grant
        self._close = close
        self._credit_all = self._credit = credit
        self._chunks: deque[bytes] = deque()
        self._rest = b""
        self._buffered_bytes = self._sequence = self._taken = 0
        self._head: Head | None = None
        self._error: HiveError | None = None
        self._is_over = self._is_closed = False
        self._wake = asyncio.Event()

    def fail(self, error: HiveError) -> None:
        """End with an error, unless it has ended."""
        if not self._is_over:
            self._error, self._is_over = error, True
            self._wake.set()

    def hurry(self, silence_s: float) -> None:
        """Wait no longer than this from now on for the next chunk: some may have been lost."""
        self._silence_s = min(self._silence_s, silence_s)
        self._wake.set()

    def receive(self, chunk: StreamChunk) -> None:
        """Take a chunk, or end with an error where it is not the one that has to come now."""
        if self._is_over:
            return
        if chunk.sequence != self._sequence:
            return self.fail(Unavailable(f"{self._name}: piece {self._sequence} of the answer was lost"))
        self._sequence += 1
        self._credit -= 1
        self._silence_s = SILENCE_S
        if chunk.error is not None:
            return self.fail(chunk.error.raised())
        if self._head is None:
            self._head = Head(chunk.status, chunk.content_type, chunk.route, chunk.executor)
        data = chunk.data.encode()
        self._chunks.append(data)
        self._buffered_bytes += len(data)
        if self._credit < 0 or self._buffered_bytes > BUFFERED_BYTES_MAX:
            self._chunks.clear()
            return self.fail(Unavailable(f"{self._name}: it sent more than it was asked for"))
        self._is_over = chunk.end
        self._wake.set()

    async def begun(self) -> Head:
        """Return once the first chunk is there. Where it raises, or is cancelled, it closes.

        Raises:
            HiveError: what the sender says, or became of it.
        """
        try:
            while self._head is None:
                if self._error is not None:
                    raise self._error
                await self._more()
            return self._head
        except BaseException:
            await self.aclose()
            raise

    async def asend(self, value: None, /) -> bytes:
        """Return all that has come since the last time; of a stream that broke off, an error event in the end.

        Raises:
            HiveError: what the sender says, or became of it, where it is no stream.
        """
        try:
            while not self._is_closed:
                data = await self._take()
                if data:
                    return data
                if not self._chunks:
                    if self._error is not None:
                        return await self._broken(self._error)
                    if self._is_over:
                        break
                    try:
                        await self._more()
                    except Unavailable as error:
                        self.fail(error)
        except BaseException:
            await self.aclose()
            raise
        await self.aclose()
        raise StopAsyncIteration

    async def _take(self) -> bytes:
        if not self._chunks:
            return b""
        self._taken += len(self._chunks)
        data = self._rest + b"".join(self._chunks)
        self._rest = b""
        self._chunks.clear()
        self._buffered_bytes = 0
        if self._taken >= self._credit_all // 2 and not self._is_over:
            amount, self._taken = self._taken, 0
            self._credit += amount
            await self._grant(amount)
        if self._is_stream and not self._is_over and not data.endswith(_EVENT_ENDS):
            # A part of an event that is too long for a message.
            self._rest, data = data, b""
        return data

    async def _broken(self, error: HiveError) -> bytes:
        if not self._is_stream:
            raise error
        await self.aclose()
        return error_event(error)

    async def _more(self) -> None:
        self._wake.clear()
        silence_s = self._silence_s
        try:
            async with asyncio.timeout(silence_s):
                await self._wake.wait()
        except TimeoutError:
            raise Unavailable(f"{self._name}: it has said nothing for {silence_s:g} s") from None

    async def athrow(self, *exception: Any) -> bytes:
        """End it with an exception."""
        await self.aclose()
        raise exception[1] if len(exception) > 1 and exception[1] is not None else exception[0]

    async def aclose(self) -> None:
        """Let go: the sender is told, where it may still send."""
        if self._is_closed:
            return
        self._is_closed = True
        still_sends = not self._is_over or self._error is not None
        self._is_over = True
        await self._close(still_sends)


_EVENT_ENDS: Final = (b"\n\n", b"\r\n\r\n", b"\r\r")
