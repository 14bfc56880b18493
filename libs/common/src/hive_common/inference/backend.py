"""Calls to what serves models at one base URL. Bodies go there as they came, and answers come back as they are.

What a back end gets wrong is made right here: names, tools that it would drop, streams without an end, errors.
"""

import asyncio
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Final

import msgspec

from hive_common.contracts.events import Model
from hive_common.inference.abilities import COMPLETION, EMBEDDING, LLAMA_CPP, TOOLS, lacking
from hive_common.inference.bodies import changed
from hive_common.inference.calls import PATHS, PIN_ANY, Answer, Head, ModelCall
from hive_common.inference.completions import assembled
from hive_common.inference.config import BackEndConfig
from hive_common.inference.discovery import Discovery, base_url
from hive_common.inference.errors import error_event
from hive_common.inference.http1 import Response
from hive_common.inference.http_pool import Pool
from hive_common.inference.names import same_model, unknown_model
from hive_common.inference.refusals import refusal, refused, stream_error
from hive_common.inference.sse import Events, data_of, is_done
from hive_common.kernel.errors import DeadlineExceeded, InvalidArgument, PayloadTooLarge, RateLimited, Unavailable
from hive_common.ops.config import read_secret

ANSWER_BYTES_MAX: Final = 64 << 20
"""An answer that is not streamed; 2,048 embeddings of 1,536 numbers have some 40 MiB."""

SILENCE_S_MAX: Final = 120.0
"""Between two events of a stream. The first one may take longer: a long prompt is read before it."""

CALLS_MAX: Final = 256

_ERROR_BYTES_MAX: Final = 64 << 10
_ERROR_START: Final = b'data: {"error":{'


class BackEnd:
    """What serves models at one base URL: a `Completer`.

    Args:
        config: where it is.
        calls_max: calls that may run at once.

    Raises:
        InvalidArgument: the URL, the key or the file of the CA cannot be used.
    """

    def __init__(self, config: BackEndConfig, calls_max: int = CALLS_MAX) -> None:
        # Read at the start: a key that cannot be read is a mistake of whoever starts this, not of a caller.
        headers = {"authorization": f"Bearer {read_secret(Path(config.key_file))}"} if config.key_file else {}
        self.url = base_url(config.url)
        self._pool = Pool(self.url, headers, config.ca_file)
        self._calls_max = calls_max
        self._discovery = Discovery(self._pool)
        self.in_flight = 0
        """Calls that run."""
        self.found: tuple[Model, ...] = ()
        """What it served when it was last looked at."""
        self.is_up = False
        """Whether it answered then."""

    async def look(self) -> tuple[Model, ...]:
        """Look at what it serves now."""
        found = await self._discovery.models()
        self.is_up = found is not None
        self.found = found or ()
        return self.found

    def close(self) -> None:
        """Close all connections. Calls that run end in an error."""
        self._pool.close()

    def model(self, name: str) -> Model | None:
        """Return the model that a call means by `name`, or None."""
        return same_model(name, self.found)

    async def models(self) -> tuple[Model, ...]:
        """Return what it served when it was last looked at."""
        return self.found

    async def complete(self, call: ModelCall) -> Answer:
        """Begin a call; see `Completer`."""
        model = self.model(call.model)
        if model is None:
            raise unknown_model(call.model, (one.name for one in self.found))
        body = _fitting(call, model)
        # llama.cpp looks for a client that left at each token of a stream, and else only once nothing has happened
        # in it for a second: under load, never.
        joins = model.backend == LLAMA_CPP and not call.stream and call.endpoint != "embeddings"
        if joins:
            call = msgspec.structs.replace(call, stream=True)
            body = changed(body, stream=True, stream_options={"include_usage": True})
        if self.in_flight >= self._calls_max:
            raise RateLimited(f"{self.url}: {self._calls_max} calls run there already", retry_after_s=1)
        self.in_flight += 1
        try:
            answer = await self._begin(call, body)
        except BaseException:
            self.in_flight -= 1
            raise
        if not call.stream:
            self.in_flight -= 1
        return await self._joined(call, answer) if joins else answer

    async def _joined(self, call: ModelCall, answer: "_Answer") -> "_Answer":
        """Return the stream as the one answer that it amounts to."""
        pieces, size = [], 0
        try:
            async for piece in answer.chunks:
                pieces.append(piece)
                size += len(piece)
                if size > ANSWER_BYTES_MAX:
                    raise Unavailable(f"{self.url}: the answer has more than {ANSWER_BYTES_MAX} bytes")
        finally:
            await answer.chunks.aclose()
        last = Events(size + 1).feed(pieces[-1])[-1]
        if (told := stream_error(last)) is not None:
            if told.code == DeadlineExceeded.code:
                raise DeadlineExceeded(f"{self.url}: {told.message}")
            raise refused(self.url, call, told.status or 500, told)
        whole = await asyncio.to_thread(assembled, b"".join(pieces))
        return _Answer(Head(answer.head.status, "application/json"), _pieces([whole]))

    async def _begin(self, call: ModelCall, body: bytes) -> "_Answer":
        deadline_s = asyncio.get_running_loop().time() + call.deadline_ms / 1000
        try:
            async with asyncio.timeout_at(deadline_s):
                response = await self._post(call, body)
                try:
                    chunks = await self._chunks(call, response, deadline_s)
                except BaseException:
                    response.close()
                    raise
        except TimeoutError as error:
            raise DeadlineExceeded(f"{self.url}: no answer within {call.deadline_ms} ms") from error
        return _Answer(Head(response.status, response.headers.get("content-type", "")), chunks)

    async def _chunks(self, call: ModelCall, response: Response, deadline_s: float) -> AsyncGenerator[bytes, None]:
        if response.status >= 300:
            raise refusal(self.url, call, response, await _limited(response))
        if response.coding:
            raise Unavailable(f"{self.url}: asked for plain bytes, it answered in {response.coding[:80]}")
        if not call.stream:
            return _pieces(await self._whole(response))
        if response.content_type != "text/event-stream":
            kind = response.content_type[:80] or "without a content-type"
            raise Unavailable(f"{self.url}: asked for a stream, it answered {kind}")
        events = self._events(call, response, deadline_s)
        # Begun, it closes the connection also when nobody ever asks for a chunk.
        await anext(events)
        return events

    async def _whole(self, response: Response) -> list[bytes]:
        pieces, size = [], 0
        while piece := await response.read():
            pieces.append(piece)
            size += len(piece)
            if size > ANSWER_BYTES_MAX:
                raise Unavailable(f"{self.url}: the answer has more than {ANSWER_BYTES_MAX} bytes")
        return pieces

    async def _post(self, call: ModelCall, body: bytes) -> Response:
        headers = {"content-type": "application/json", "x-request-id": call.id}
        if call.pin != PIN_ANY:
            # The back end may be a gateway, which then narrows its own.
            headers["x-hive-pin"] = call.pin
        return await self._pool.request("POST", PATHS[call.endpoint], body, headers)

    async def _events(self, call: ModelCall, response: Response, deadline_s: float) -> AsyncGenerator[bytes, None]:
        """Yield nothing once the first event is there; then whole events, the last of which ends the stream."""
        loop = asyncio.get_running_loop()
        cutter, last, has_begun, is_whole = Events(), b"", False, False
        try:
            while not is_whole:
                until_s = min(deadline_s, loop.time() + SILENCE_S_MAX) if has_begun else deadline_s
                data = await response.read(until_s)
                if not data:
                    break
                events = cutter.feed(data)
                if not has_begun:
                    events = self._first(call, events)
                    has_begun = bool(events)
                    if has_begun:
                        yield b""
                events, is_whole = _until_done(events)
                if events:
                    last = events[-1]
                    yield last if len(events) == 1 else b"".join(events)
            if not has_begun:
                raise Unavailable(f"{self.url}: the stream ended before it began", url=self.url)
            if not is_whole and not last.startswith(_ERROR_START):
                told = stream_error(last)
                text = "the stream ended too early" if told is None else told.message
                yield error_event(Unavailable(f"{self.url}: {text}"))
        except TimeoutError:
            if not has_begun:
                raise
            if loop.time() >= deadline_s:
                yield error_event(DeadlineExceeded(f"no whole answer within {call.deadline_ms} ms"))
            else:
                yield error_event(Unavailable(f"{self.url}: silent for {SILENCE_S_MAX:g} s"))
        except PayloadTooLarge as error:
            if not has_begun:
                raise
            yield error_event(Unavailable(f"{self.url}: {error.message}"))
        except Unavailable as error:
            if not has_begun:
                raise
            yield error_event(error)
        finally:
            if has_begun:
                self.in_flight -= 1
            if is_whole:
                response.leave()
            else:
                # It ends the generation.
                response.close()

    def _first(self, call: ModelCall, events: list[bytes]) -> list[bytes]:
        """Return the events from the first that is one: before it there may be comments, or an error instead."""
        for number, event in enumerate(events):
            if (told := stream_error(event)) is not None:
                raise refused(self.url, call, told.status or 500, told)
            if data_of(event) is not None:
                return events[number:]
        return []


class _Answer(msgspec.Struct):
    head: Head
    chunks: AsyncGenerator[bytes, None]


class _Asked(msgspec.Struct, frozen=True):
    tools: list[msgspec.Raw] | None = None
    functions: list[msgspec.Raw] | None = None


def _fitting(call: ModelCall, model: Model) -> bytes:
    """Return the body as the back end has to get it.

    Raises:
        InvalidArgument: the model cannot do what is asked. Some back ends would answer all the same.
    """
    wanted = EMBEDDING if call.endpoint == "embeddings" else COMPLETION
    if lacking(model, (wanted,)):
        told = "only makes embeddings; call /v1/embeddings" if wanted == COMPLETION else "makes no embeddings"
        raise InvalidArgument(f"the model `{model.name}` {told}", reason="unsupported", need=wanted)
    try:
        if call.endpoint == "chat" and lacking(model, (TOOLS,)):
            asked = msgspec.json.decode(call.body, type=_Asked)
            if asked.tools or asked.functions:
                raise InvalidArgument(
                    f"the model `{model.name}` has no tools in its chat template and would ignore them; "
                    "leave out `tools`, or use a model that was made for them",
                    reason="unsupported",
                    need=TOOLS,
                    path="tools",
                )
        if call.model == model.name:
            return call.body
        # An alias, which only Ollama understands.
        body = msgspec.json.decode(call.body, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"body: {error}; expected a JSON object", path="body") from error
    body["model"] = msgspec.Raw(msgspec.json.encode(model.name))
    return msgspec.json.encode(body)


def _until_done(events: list[bytes]) -> tuple[list[bytes], bool]:
    for number, event in enumerate(events):
        if is_done(event):
            return events[: number + 1], True
    return events, False


async def _pieces(pieces: list[bytes]) -> AsyncGenerator[bytes, None]:
    for piece in pieces:
        yield piece


async def _limited(response: Response) -> bytes:
    """Return the beginning of what a refusal says; nothing, where that is coded."""
    data = bytearray()
    try:
        while not response.coding and len(data) < _ERROR_BYTES_MAX and (piece := await response.read()):
            data += piece
    finally:
        response.close()
    return bytes(data[:_ERROR_BYTES_MAX])
