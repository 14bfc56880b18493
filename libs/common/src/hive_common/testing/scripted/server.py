"""The scripted back end: OpenAI's paths over a raw asyncio protocol, so that it costs a benchmark little."""

import asyncio
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Final, Self

import msgspec

from hive_common.testing.scripted.answers import Chat, Completion, Embeddings, ToolCall, words_of
from hive_common.testing.scripted.http import LAST_CHUNK, Connection, chunk
from hive_common.testing.scripted.listings import listing
from hive_common.testing.scripted.script import Counts, Generation, Request, Script

log = logging.getLogger(__name__)

REMEMBERED: Final = 10_000
"""Requests and generations that are kept."""
_CALLS: Final = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings")
_TOKENS_AT_ONCE: Final = 64
"""Tokens without a pace are written so many at a time, and only as fast as they are taken."""


class ScriptedBackEnd:
    """A back end in this process.

    async with ScriptedBackEnd(Script(tokens=3, pace_ms=1)) as back_end:
        ... back_end.url ... back_end.requests ... back_end.generations ...

    Over HTTP besides: `GET /scripted/counts`, `GET /scripted/generations`, and `POST /scripted/script` with the
    fields of `Script` that are to change.
    """

    def __init__(self, script: Script | None = None, *, port: int = 0, host: str = "127.0.0.1") -> None:
        self.script = script or Script()
        self.requests: deque[Request] = deque(maxlen=REMEMBERED)
        self.generations: deque[Generation] = deque(maxlen=REMEMBERED)
        self.counts = Counts()
        self.port = port
        self._host = host
        self._server: asyncio.Server | None = None
        self._changed = asyncio.Event()
        self._connections: set[_Calls] = set()
        self._errors_left = self.script.error_calls

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://{self._host}:{self.port}"

    @property
    def calls(self) -> list[Request]:
        """The model calls among the requests."""
        return [request for request in self.requests if request.path in _CALLS]

    def play(self, **changes: Any) -> None:
        """Change the script for the calls that come from now on."""
        self.script = msgspec.structs.replace(self.script, **changes)
        self._errors_left = self.script.error_calls

    async def start(self) -> None:
        """Listen; `port` is known afterwards, and the same at a second start."""
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(lambda: _Calls(self), self._host, self.port, backlog=1024)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening and cut what is connected."""
        if self._server is not None:
            self._server.close()
            self._server = None
            for connection in tuple(self._connections):
                connection.drop()
            await self.until(lambda: not self._connections)

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def until(self, condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
        """Wait until `condition`, looked at whenever something happens here, holds. Raises TimeoutError."""
        async with asyncio.timeout(timeout_s):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def _happened(self) -> None:
        self._changed.set()

    def _takes_error(self) -> bool:
        if not self.script.error_status or self._errors_left == 0:
            return False
        self._errors_left -= 1
        return True


class _Calls(Connection):
    def __init__(self, back_end: ScriptedBackEnd) -> None:
        super().__init__()
        self._back_end = back_end
        self._playing: _Playing | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._back_end._connections.add(self)
        self._back_end.counts.connections += 1

    def connection_lost(self, error: Exception | None) -> None:
        self._back_end._connections.discard(self)
        if self._playing is not None:
            self._playing.end("cancelled")
        self._back_end._happened()

    def pause_writing(self) -> None:
        if self._playing is not None:
            self._playing.pause()

    def resume_writing(self) -> None:
        if self._playing is not None:
            self._playing.resume()

    def took(self, request: Request) -> None:
        back_end = self._back_end
        if request.path.startswith("/scripted/"):
            return self._control(request)
        back_end.requests.append(request)
        back_end.counts.requests += 1
        back_end._happened()
        script = back_end.script
        if script.api_key and request.headers.get("authorization") != f"Bearer {script.api_key}":
            return self._refuse(401, "the key is wrong", "invalid_api_key")
        try:
            body = msgspec.json.decode(request.body) if request.body else {}
        except msgspec.DecodeError as error:
            return self._refuse(400, f"the body is not JSON: {error}", "invalid_json")
        if request.path not in _CALLS:
            found = listing(script, request.path, body)
            if found is None:
                return self._refuse(404, f"no {request.path}", "not_found")
            return self.answer(200, msgspec.json.encode(found))
        self._call(request, body)

    def _call(self, request: Request, body: dict[str, Any]) -> None:
        script = self._back_end.script
        if self._back_end._takes_error():
            self._back_end.counts.failed += 1
            return self._refuse(script.error_status, "scripted error", "scripted")
        model = str(body.get("model", ""))
        known = script.model(model) or (script.model(f"{model}:latest") if script.flavour == "ollama" else None)
        if known is None:
            if script.flavour != "llama.cpp":
                return self._refuse(404, f"model '{model}' not found", "model_not_found")
            known = script.models[0]
        words = words_of(body)
        asked = body.get("max_completion_tokens") or body.get("max_tokens")
        tokens = script.tokens if asked is None else min(script.tokens, int(asked))
        if script.context_tokens and words + (int(asked) if asked else 0) > script.context_tokens:
            text = f"maximum context length is {script.context_tokens} tokens, {words} were given"
            return self._refuse(400, text, "context_length_exceeded")
        tools = body.get("tools") if known.tools and body.get("tool_choice") != "none" else None
        generation = Generation(
            path=request.path,
            model=model,
            started_s=asyncio.get_running_loop().time(),
            stream=bool(body.get("stream")),
        )
        has_usage = bool((body.get("stream_options") or {}).get("include_usage"))
        player: Chat
        if request.path == "/v1/embeddings":
            tokens, player = 0, Embeddings(body, script.dimensions, words)
        elif tools:
            tokens, player = 1, ToolCall(model, tools[0]["function"]["name"], words, has_usage)
        elif request.path == "/v1/chat/completions":
            player = Chat(model, words, has_usage)
        else:
            player = Completion(model, words, has_usage)
        self._playing = _Playing(self, self._back_end, generation, player, tokens)

    def _refuse(self, status: int, message: str, code: str) -> None:
        script = self._back_end.script
        retry = b"retry-after: %d\r\n" % script.retry_after_s if script.retry_after_s else b""
        error = {"message": message, "type": "scripted_error", "param": None, "code": code}
        self.answer(status, msgspec.json.encode({"error": error}), retry)

    def _control(self, request: Request) -> None:
        back_end = self._back_end
        if request.path == "/scripted/script":
            try:
                known = msgspec.to_builtins(back_end.script)
                changed = msgspec.convert({**known, **msgspec.json.decode(request.body)}, Script)
            except msgspec.MsgspecError as error:
                return self._refuse(400, str(error), "script")
            back_end.script = changed
            back_end._errors_left = changed.error_calls
            return self.answer(200, msgspec.json.encode(changed))
        if request.path == "/scripted/counts":
            return self.answer(200, msgspec.json.encode(back_end.counts))
        if request.path == "/scripted/generations":
            return self.answer(200, msgspec.json.encode(tuple(back_end.generations)))
        self._refuse(404, f"no {request.path}", "not_found")

    def over(self) -> None:
        """The answer is done."""
        self._playing = None
        self._back_end._happened()


class _Playing:
    """One answer on its way."""

    def __init__(
        self, connection: _Calls, back_end: ScriptedBackEnd, generation: Generation, player: Chat, tokens: int
    ) -> None:
        self._connection = connection
        self._back_end = back_end
        self._generation = generation
        self._player = player
        self._tokens = tokens
        self._script = back_end.script
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.Handle | None = None
        self._is_paused = False
        self._has_begun = False
        back_end.generations.append(generation)
        counts = back_end.counts
        counts.active += 1
        counts.active_max = max(counts.active_max, counts.active)
        self._due_s = generation.started_s + self._script.first_token_ms / 1000
        if generation.stream:
            connection.begin_stream()
        self._plan()

    def pause(self) -> None:
        self._is_paused = True
        self._back_end.counts.paused += 1
        self._back_end._happened()

    def resume(self) -> None:
        self._is_paused = False
        if self._timer is None and not self._generation.outcome:
            self._plan()

    def end(self, outcome: str) -> None:
        if self._generation.outcome:
            return
        if self._timer is not None:
            self._timer.cancel()
        self._generation.outcome = outcome
        self._generation.ended_s = self._loop.time()
        counts = self._back_end.counts
        counts.active -= 1
        setattr(counts, outcome, getattr(counts, outcome) + 1)
        self._connection.over()

    def _plan(self) -> None:
        if self._due_s <= self._loop.time():
            self._go_on()
        else:
            self._timer = self._loop.call_at(self._due_s, self._go_on)

    def _go_on(self) -> None:
        """Play every token that is due."""
        self._timer = None
        generation, script = self._generation, self._script
        events: list[bytes] = []
        while generation.tokens < self._tokens and self._due_s <= self._loop.time():
            number = generation.tokens
            if self._is_paused or len(events) >= _TOKENS_AT_ONCE:
                break
            if number in (script.hang_after, script.drop_after, script.stop_after, script.error_after):
                return self._misbehave(number, events)
            generation.tokens += 1
            self._back_end.counts.tokens += 1
            if generation.stream:
                events.append(self._player.token(number))
            self._due_s += script.pace_ms / 1000
        self._send(events)
        if generation.tokens >= self._tokens and not generation.outcome:
            return self._finish()
        if not self._is_paused and not generation.outcome:
            self._timer = self._loop.call_at(self._due_s, self._go_on)

    def _send(self, events: list[bytes], end: bytes = b"") -> None:
        if not self._generation.stream:
            return
        if not self._has_begun and (events or end):
            self._has_begun = True
            events = [self._player.first(), *events]
        # One event is one chunk: readers must not rely on that, and tests of them split further.
        sent = b"".join([chunk(event) for event in events if event])
        if sent or end:
            self._connection.write(sent + end)

    def _finish(self) -> None:
        tokens = self._generation.tokens
        reason = "stop" if tokens >= self._script.tokens else "length"
        connection = self._connection
        if self._generation.stream:
            done = self._player.last(tokens, reason) + b"data: [DONE]\n\n"
            self._send([], chunk(done) + LAST_CHUNK)
            self.end("completed")
            connection.answered()
        else:
            whole = self._player.whole(tokens, reason)
            self.end("completed")
            connection.answer(200, whole)

    def _misbehave(self, number: int, events: list[bytes]) -> None:
        script, connection = self._script, self._connection
        # Instead of the first token: instead of anything.
        self._has_begun = self._has_begun or number == 0
        self._send(events)
        if number == script.hang_after:
            return
        if number == script.drop_after:
            self.end("dropped")
            # What was written goes out before the connection is cut: closing waits for it.
            assert connection.transport is not None
            connection.transport.close()
            return
        self.end("failed")
        if not self._generation.stream:
            connection.answer(500, b'{"error":{"message":"scripted error","type":"server_error","code":500}}')
            return
        error = b'data: {"error":{"message":"scripted error","type":"server_error","code":500}}\n\n'
        self._send([error] if number == script.error_after else [], LAST_CHUNK)
        connection.answered()
