"""An answer that this device gives itself, seen on its way: what was asked, how much it took, how it ended."""

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any, Final

import msgspec
from hive_common.contracts.messages import ModelCallReport
from hive_common.inference.bodies import asking_for_usage
from hive_common.inference.calls import ModelCall
from hive_common.inference.tally import Tally
from hive_common.kernel.errors import body_of

CANCELLED: Final = "cancelled"


class Finished(msgspec.Struct, frozen=True):
    """A call that ended, and what was asked and answered, where that is kept.

    `response` is the JSON of the answer, or of a stream its events.
    """

    report: ModelCallReport
    is_stream: bool
    request: bytes = b""
    response: bytes = b""

    @property
    def kept_bytes(self) -> int:
        """How much it takes while it waits."""
        return len(self.request) + len(self.response)


class _Options(msgspec.Struct):
    stream_options: msgspec.Raw = msgspec.Raw(b"")


class Watched(AsyncGenerator[bytes, None]):
    """One call that this device serves, and then the chunks of its answer.

    Args:
        call: as it came.
        finished: is told once it has ended.

    Attributes:
        call: as the back end gets it; a stream is asked for its usage.
    """

    def __init__(self, call: ModelCall, finished: Callable[[Finished], None]) -> None:
        self._asked = call
        self._keeps = not call.counts_only
        self._finished = finished
        self._started_s = time.perf_counter()
        self._first_byte_ms = 0
        self._chunks: AsyncGenerator[bytes, None] | None = None
        self._whole: list[bytes] = []
        self._is_over = False
        drop_usage = False
        options = _options(call) if call.stream and call.endpoint != "embeddings" else None
        if options is not None:
            body, drop_usage = asking_for_usage(call.body, options)
            call = msgspec.structs.replace(call, body=body)
        self.call = call
        self._tally = Tally(self._keeps, drop_usage)

    def failed(self, error: BaseException) -> None:
        """Note that it did not begin."""
        self._end(CANCELLED if isinstance(error, asyncio.CancelledError) else body_of(error).code)

    def answered(self, chunks: AsyncGenerator[bytes, None]) -> "Watched":
        """Watch an answer that has begun."""
        self._chunks = chunks
        self._first_byte_ms = self._passed_ms()
        return self

    async def asend(self, value: None, /) -> bytes:
        """Return the next chunk."""
        assert self._chunks is not None
        try:
            while True:
                data = await anext(self._chunks)
                if not self._asked.stream:
                    self._whole.append(data)
                    return data
                passed = self._tally.events(data)
                if passed:
                    return passed
        except StopAsyncIteration:
            self._end("")
            raise
        except BaseException as error:
            await self._chunks.aclose()
            self._end(CANCELLED if isinstance(error, asyncio.CancelledError) else body_of(error).code)
            raise

    async def athrow(self, *exception: Any) -> bytes:
        """End it with an exception."""
        await self.aclose()
        raise exception[1] if len(exception) > 1 and exception[1] is not None else exception[0]

    async def aclose(self) -> None:
        """Cancel the generation, if it goes on."""
        if self._chunks is not None:
            await self._chunks.aclose()
        # Whoever stops reading after the last event has the whole answer.
        is_whole = self._tally.done or self._tally.error
        self._end("" if is_whole else CANCELLED)

    def _end(self, code: str) -> None:
        if self._is_over:
            return
        self._is_over = True
        call, tally = self._asked, self._tally
        if not call.stream and not code:
            tally.whole(b"".join(self._whole))
        code = code or tally.error
        self._finished(
            Finished(
                ModelCallReport(
                    call=call.id,
                    endpoint=call.endpoint,
                    model=call.model,
                    code=code,
                    prompt_tokens=tally.prompt_tokens,
                    completion_tokens=tally.completion_tokens,
                    wall_ms=self._passed_ms(),
                    first_byte_ms=self._first_byte_ms,
                    pin=call.pin,
                    token=call.token,
                ),
                call.stream,
                call.body if self._keeps else b"",
                tally.kept if self._keeps else b"",
            )
        )

    def _passed_ms(self) -> int:
        return round((time.perf_counter() - self._started_s) * 1000)


def _options(call: ModelCall) -> bytes | None:
    """Return the `stream_options` of a body, or None where it is for the back end to refuse."""
    try:
        return bytes(msgspec.json.decode(call.body, type=_Options).stream_options)
    except msgspec.DecodeError:
        return None
