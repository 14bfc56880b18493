"""A completer for guests that answers at once, or never, and remembers what it was asked."""

import asyncio
from collections.abc import AsyncGenerator, Sequence

import msgspec
from hive_common.contracts.events import Model
from hive_common.inference.calls import Head, ModelCall
from hive_common.kernel.errors import HiveError


class Played:
    """One answer: its pieces as they come."""

    def __init__(self, chunks: AsyncGenerator[bytes, None]) -> None:
        self.head = Head(200, "application/json")
        self.chunks = chunks


class Scripted:
    """Answers each call with `answer`, of which it says that it has `tokens`.

    Args:
        tokens: None to say nothing.
        error: raised instead.
        hangs: the answer begins and goes on for ever.
        lets_go: a cancelled answer ends only then.
    """

    def __init__(
        self,
        text: str = "four",
        tokens: int | None = 3,
        *,
        error: HiveError | None = None,
        hangs: bool = False,
        body: bytes | None = None,
        lets_go: asyncio.Event | None = None,
    ) -> None:
        self._lets_go = lets_go
        self.calls: list[ModelCall] = []
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self._error = error
        self._hangs = hangs
        answer = {
            "choices": [{"message": {"role": "assistant", "content": text}, "text": text}],
            "data": [{"index": 1, "embedding": [2.0]}, {"index": 0, "embedding": [1.0]}],
            **({} if tokens is None else {"usage": {"completion_tokens": tokens}}),
        }
        self._body = body or msgspec.json.encode(answer)

    async def complete(self, call: ModelCall) -> Played:
        self.calls.append(call)
        if self._error is not None:
            raise self._error
        return Played(self._chunks())

    async def _chunks(self) -> AsyncGenerator[bytes, None]:
        try:
            self.begun.set()
            if self._hangs:
                yield b"{"
                await asyncio.Event().wait()
            yield self._body[:1]
            yield self._body[1:]
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.set()
            if self._lets_go is not None:
                await self._lets_go.wait()
            raise

    async def models(self) -> Sequence[Model]:
        return [Model("cold", "x"), Model("warm", "x", loaded=True)]
