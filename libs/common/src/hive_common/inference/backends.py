"""Calls to what serves models at base URLs. Bodies go there as they came, and answers come back as they are.

What a back end gets wrong is made right here: names, tools that it would drop, streams without an end, errors.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from pathlib import Path
from typing import Final

import aiohttp
import msgspec

from hive_common.contracts.events import Model
from hive_common.inference.bodies import changed
from hive_common.inference.calls import PATHS, PIN_ANY, Answer, Head, ModelCall
from hive_common.inference.completions import assembled
from hive_common.inference.config import BackEndConfig
from hive_common.inference.discovery import COMPLETION, EMBEDDING, LLAMA_CPP, TOOLS, Discovery, may
from hive_common.inference.errors import error_event
from hive_common.inference.names import same_model, unknown_model
from hive_common.inference.refusals import refusal, refused, stream_error
from hive_common.inference.sse import Events, data_of, is_done
from hive_common.kernel.errors import (
    DeadlineExceeded,
    HiveError,
    InvalidArgument,
    NotFound,
    PayloadTooLarge,
    RateLimited,
    Unavailable,
)
from hive_common.ops.config import read_secret

log = logging.getLogger(__name__)

ANSWER_BYTES_MAX: Final = 64 << 20
"""An answer that is not streamed; 2,048 embeddings of 1,536 numbers have some 40 MiB."""

SILENCE_S_MAX: Final = 120.0
"""Between two events of a stream. The first one may take longer: a long prompt is read before it."""

CALLS_MAX: Final = 256
LOOK_AGAIN_S: Final = 1.0
"""A call for a model that is not known has it looked for again, but not more often than this."""

_CONNECT: Final = aiohttp.ClientTimeout(total=None, sock_connect=2.0)
_ERROR_BYTES_MAX: Final = 64 << 10
_ERROR_START: Final = b'data: {"error":{'


class BackEnd:
    """What serves models at one base URL: a `Completer`.

    Args:
        config: where it is.
        session: shared by all of them.
        calls_max: calls that may run at once.
    """

    def __init__(self, config: BackEndConfig, session: aiohttp.ClientSession, calls_max: int = CALLS_MAX) -> None:
        # Read at the start: a key that cannot be read is a mistake of whoever starts this, not of a caller.
        self._headers = {"authorization": f"Bearer {read_secret(Path(config.key_file))}"} if config.key_file else {}
        self._session = session
        self._calls_max = calls_max
        self._discovery = Discovery(config.url, self._headers)
        self.url = self._discovery.url
        self.in_flight = 0
        """Calls that run."""
        self.found: tuple[Model, ...] = ()
        """What it served when it was last looked at."""
        self.is_up = False
        """Whether it answered then."""

    async def look(self) -> tuple[Model, ...]:
        """Look at what it serves now."""
        found = await self._discovery.models(self._session)
        self.is_up = found is not None
        self.found = found or ()
        return self.found

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
        except (aiohttp.ClientError, OSError) as error:
            # Whoever pays for calls has to know which ones cannot have begun.
            reached = not isinstance(error, aiohttp.ClientConnectorError)
            raise Unavailable(f"{self.url}: {_told(error)}", url=self.url, reached=reached) from error
        return _Answer(Head(response.status, response.headers.get("content-type", "")), chunks)

    async def _chunks(
        self, call: ModelCall, response: aiohttp.ClientResponse, deadline_s: float
    ) -> AsyncGenerator[bytes, None]:
        if response.status >= 300:
            raise refusal(self.url, call, response, await _limited(response))
        if not call.stream:
            return _pieces(await _whole(self.url, response))
        if response.content_type != "text/event-stream":
            raise Unavailable(f"{self.url}: asked for a stream, it answered {response.content_type}")
        events = self._events(call, response, deadline_s)
        # Begun, it closes the connection also when nobody ever asks for a chunk.
        await anext(events)
        return events

    async def _post(self, call: ModelCall, body: bytes) -> aiohttp.ClientResponse:
        url = self.url + PATHS[call.endpoint]
        headers = {"content-type": "application/json", "x-request-id": call.id, **self._headers}
        if call.pin != PIN_ANY:
            # The back end may be a gateway, which then narrows its own.
            headers["x-hive-pin"] = call.pin
        for is_last in (False, True):
            try:
                return await self._session.post(
                    url, data=body, headers=headers, allow_redirects=False, timeout=_CONNECT
                )
            except (aiohttp.ServerDisconnectedError, aiohttp.ClientOSError) as error:
                # Else it was a connection of the pool, which the server had closed just before.
                if is_last or isinstance(error, aiohttp.ClientConnectorError):
                    raise
        raise AssertionError

    async def _events(
        self, call: ModelCall, response: aiohttp.ClientResponse, deadline_s: float
    ) -> AsyncGenerator[bytes, None]:
        """Yield nothing once the first event is there; then whole events, the last of which ends the stream."""
        loop = asyncio.get_running_loop()
        cutter, last, has_begun, is_whole = Events(), b"", False, False
        try:
            while not is_whole:
                until_s = min(deadline_s, loop.time() + SILENCE_S_MAX) if has_begun else deadline_s
                async with asyncio.timeout_at(until_s):
                    data = await response.content.readany()
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
        except (aiohttp.ClientError, OSError, PayloadTooLarge) as error:
            if not has_begun:
                raise
            yield error_event(Unavailable(f"{self.url}: the stream broke off: {_told(error)}"))
        finally:
            if has_begun:
                self.in_flight -= 1
            # Unless all of it was read, which gave the connection back already. It ends the generation.
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


class BackEnds:
    """Several back ends as one `Completer`; the first that has a model serves it, the next where that fails.

    async with BackEnds(urls) as back_ends: ...

    Args:
        back_ends: base URLs, or configurations with a key.
        calls_max: calls that may run at each of them at once.
        looks: asks them what they serve; else whoever opens this sets their `found`.

    Raises:
        InvalidArgument: a key cannot be read.
    """

    def __init__(
        self, back_ends: Iterable[str | BackEndConfig], calls_max: int = CALLS_MAX, *, looks: bool = True
    ) -> None:
        self._looks = looks
        self._configs = [one if isinstance(one, BackEndConfig) else BackEndConfig(one) for one in back_ends]
        self._calls_max = calls_max
        self._session: aiohttp.ClientSession | None = None
        self._looking: asyncio.Task[tuple[Model, ...]] | None = None
        self._looked_s = 0.0
        self.all: tuple[BackEnd, ...] = ()
        """In the order of the configuration, once opened."""

    async def open(self) -> None:
        """Make the pool of connections, and look at what is there."""
        # Calls are bounded by `calls_max`; a bound of the pool would only make them wait unseen.
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=15, ttl_dns_cache=60)
        session = aiohttp.ClientSession(
            connector=connector, trust_env=False, auto_decompress=True, cookie_jar=aiohttp.DummyCookieJar()
        )
        self._session = session
        try:
            self.all = tuple(BackEnd(config, session, self._calls_max) for config in self._configs)
        except HiveError:
            await self.close()
            raise
        if self._looks:
            await self.look()

    async def close(self) -> None:
        """Close all connections."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def __aenter__(self) -> "BackEnds":
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def run(self, interval_ms: int, on_change: Callable[[], None] = lambda: None) -> None:
        """Look again and again, and call `on_change` when something is different. Ends only by being cancelled."""
        while True:
            await asyncio.sleep(interval_ms / 1000)
            before = self.found
            if await self.look() != before:
                on_change()

    async def look(self) -> tuple[Model, ...]:
        """Look at what all of them serve now, and return each model once, in order of name."""
        if self._looking is None or self._looking.done():
            self._looking = asyncio.create_task(self._look())
        # Whoever waits may go; the others still want to know.
        return await asyncio.shield(self._looking)

    async def _look(self) -> tuple[Model, ...]:
        await asyncio.gather(*(one.look() for one in self.all))
        self._looked_s = time.monotonic()
        return self.found

    @property
    def found(self) -> tuple[Model, ...]:
        """What was found when they were last looked at, each model once, in order of name."""
        by_name = {model.name: model for one in reversed(self.all) for model in one.found}
        return tuple(by_name[name] for name in sorted(by_name))

    def serving(self, name: str) -> list[BackEnd]:
        """Return those that have a model, in order."""
        return [one for one in self.all if one.model(name) is not None]

    async def models(self) -> tuple[Model, ...]:
        """Return what was found when they were last looked at."""
        return self.found

    async def complete(self, call: ModelCall) -> Answer:
        """Begin a call; see `Completer`."""
        serving = self.serving(call.model)
        if not serving and time.monotonic() - self._looked_s > LOOK_AGAIN_S:
            await self.look()
            serving = self.serving(call.model)
        if not serving:
            raise unknown_model(call.model, (model.name for model in self.found))
        failure: HiveError | None = None
        for one in serving:
            try:
                return await one.complete(call)
            except (Unavailable, RateLimited, NotFound) as error:
                log.info("%s", error.message)
                failure = failure or error
        assert failure is not None
        raise failure


class _Asked(msgspec.Struct, frozen=True):
    tools: list[msgspec.Raw] | None = None
    functions: list[msgspec.Raw] | None = None


def _fitting(call: ModelCall, model: Model) -> bytes:
    """Return the body as the back end has to get it.

    Raises:
        InvalidArgument: the model cannot do what is asked. Some back ends would answer all the same.
    """
    wanted = EMBEDDING if call.endpoint == "embeddings" else COMPLETION
    # Only a model that is told to embed is told not to answer: few back ends tell about embedding.
    if wanted == COMPLETION and EMBEDDING in model.abilities and COMPLETION not in model.abilities:
        raise InvalidArgument(
            f"the model `{model.name}` only makes embeddings; call /v1/embeddings",
            reason="unsupported",
            need=wanted,
        )
    try:
        if call.endpoint == "chat" and not may(model, TOOLS):
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


async def _whole(url: str, response: aiohttp.ClientResponse) -> list[bytes]:
    pieces, size = [], 0
    async for piece in response.content.iter_any():
        pieces.append(piece)
        size += len(piece)
        if size > ANSWER_BYTES_MAX:
            raise Unavailable(f"{url}: the answer has more than {ANSWER_BYTES_MAX} bytes")
    return pieces


async def _limited(response: aiohttp.ClientResponse) -> bytes:
    data = bytearray()
    async for piece in response.content.iter_any():
        data += piece
        if len(data) > _ERROR_BYTES_MAX:
            response.close()
            break
    return bytes(data[:_ERROR_BYTES_MAX])


def _told(error: BaseException) -> str:
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"cannot be reached: {error.os_error.strerror or error.os_error}"
    return str(error) or type(error).__name__
