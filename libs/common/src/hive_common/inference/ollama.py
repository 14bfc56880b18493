"""Ollama's API over a `Completer`, whatever the back end speaks: it is translated to OpenAI's calls and back."""

from collections.abc import Awaitable, Callable
from types import MappingProxyType
from typing import Any, Final

import msgspec

from hive_common.contracts.events import Model
from hive_common.inference import ollama_answers as answers
from hive_common.inference import ollama_calls as calls
from hive_common.inference.bodies import decode
from hive_common.inference.calls import Completer, Endpoint
from hive_common.inference.exchange import Callers, ClientGone, Exchange, Receive, Scope, Send, Shape
from hive_common.inference.openai import find
from hive_common.kernel.errors import InvalidArgument, NotFound

API_VERSION: Final = "0.13.0"
"""The release of Ollama whose API this follows. Editors ask for it, and refuse what is older than they need."""

ROOT: Final = "/"
RUNNING: Final = b"Ollama is running"

_METHODS: Final = MappingProxyType(
    {
        ROOT: ("GET", "HEAD"),
        "/api/tags": ("GET", "HEAD"),
        "/api/ps": ("GET",),
        "/api/version": ("GET", "HEAD"),
        "/api/show": ("POST",),
        "/api/chat": ("POST",),
        "/api/generate": ("POST",),
        "/api/embed": ("POST",),
        "/api/embeddings": ("POST",),
    }
)
_ELSEWHERE: Final = frozenset({"/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete"})


class Ollama:
    """An ASGI application that takes Ollama's paths.

    Args:
        completer: serves the calls.
        callers: says who calls.
    """

    def __init__(self, completer: Completer, callers: Callers) -> None:
        self._completer = completer
        self._callers = callers
        self._handlers: dict[str, Callable[[Scope, Exchange], Awaitable[None]]] = {
            ROOT: self._root,
            "/api/tags": self._tags,
            "/api/ps": self._ps,
            "/api/version": self._version,
            "/api/show": self._show,
            "/api/chat": self._chat,
            "/api/generate": self._generate,
            "/api/embed": self._embed,
            "/api/embeddings": self._embeddings,
        }

    @staticmethod
    def route(path: str) -> str | None:
        """Return the template of a path that is answered here, else None."""
        if path in _METHODS or path in _ELSEWHERE:
            return path
        return "/api/{other}" if path.startswith("/api/") else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        exchange = Exchange(scope, receive, send)
        try:
            await self._answer(scope, exchange)
        except ClientGone:
            # Nobody is left who could be told.
            return
        except Exception as error:  # noqa: BLE001 - whatever is raised becomes an answer
            await exchange.fail(error, answers.Completions("chat", ""))

    async def _answer(self, scope: Scope, exchange: Exchange) -> None:
        path, method = scope["path"], scope["method"]
        if path in _ELSEWHERE:
            text = f"{path}: models are fetched and removed where they are served, on the device itself"
            await _say(exchange, 501, {"error": text})
        elif path not in _METHODS:
            raise NotFound(f"there is nothing at {path}")
        elif method not in _METHODS[path]:
            await _say(exchange, 405, {"error": f"{method} is not allowed on {path}"})
        else:
            await self._handlers[path](scope, exchange)

    async def _root(self, scope: Scope, exchange: Exchange) -> None:
        await exchange.send(200, RUNNING, "text/plain; charset=utf-8")

    async def _version(self, scope: Scope, exchange: Exchange) -> None:
        await _say(exchange, 200, {"version": API_VERSION})

    async def _tags(self, scope: Scope, exchange: Exchange) -> None:
        self._callers(scope)
        await _say(exchange, 200, {"models": list(map(answers.listed, await self._completer.models()))})

    async def _ps(self, scope: Scope, exchange: Exchange) -> None:
        self._callers(scope)
        loaded = [answers.running(model) for model in await self._completer.models() if model.loaded]
        await _say(exchange, 200, {"models": loaded})

    async def _show(self, scope: Scope, exchange: Exchange) -> None:
        self._callers(scope)
        named = decode(await exchange.body(), calls.Named)
        await _say(exchange, 200, answers.shown(await self._find(_required(named.model or named.name))))

    async def _chat(self, scope: Scope, exchange: Exchange) -> None:
        asked = decode(await exchange.body(), calls.Chat)
        if not asked.messages:
            return await self._load(scope, exchange, "chat", asked)
        body, shape = calls.chat_body(asked), answers.Completions("chat", asked.model)
        await self._complete(scope, exchange, "chat", asked.model, body, calls.streams(asked), shape)

    async def _generate(self, scope: Scope, exchange: Exchange) -> None:
        asked = decode(await exchange.body(), calls.Generate)
        if not asked.prompt and not asked.images:
            return await self._load(scope, exchange, "generate", asked)
        endpoint: Endpoint = "completions" if calls.generate_is_raw(asked) else "chat"
        body, shape = calls.generate_body(asked), answers.Completions("generate", asked.model)
        await self._complete(scope, exchange, endpoint, asked.model, body, calls.streams(asked), shape)

    async def _embed(self, scope: Scope, exchange: Exchange) -> None:
        asked = decode(await exchange.body(), calls.Embed)
        if asked.input is None:
            raise InvalidArgument("body.input: expected a text or a list of texts", path="input")
        body, shape = calls.embed_body(asked), answers.Vectors(asked.model, older=False)
        await self._complete(scope, exchange, "embeddings", asked.model, body, False, shape)

    async def _embeddings(self, scope: Scope, exchange: Exchange) -> None:
        asked = decode(await exchange.body(), calls.Embeddings)
        body = calls.embed_body(calls.Embed(model=asked.model, input=asked.prompt or ""))
        shape = answers.Vectors(asked.model, older=True)
        await self._complete(scope, exchange, "embeddings", asked.model, body, False, shape)

    async def _complete(
        self,
        scope: Scope,
        exchange: Exchange,
        endpoint: Endpoint,
        model: str,
        body: bytes,
        stream: bool,
        shape: Shape,
    ) -> None:
        call = exchange.call(self._callers(scope), endpoint, _required(model), body, stream)
        await exchange.complete(self._completer, call, shape)

    async def _load(self, scope: Scope, exchange: Exchange, kind: answers.Kind, asked: calls.Asked) -> None:
        """Answer a call without a prompt: Ollama would load the model now, here it is only looked up."""
        self._callers(scope)
        await self._find(_required(asked.model))
        reason = "unload" if calls.unloads(asked) else "load"
        await exchange.send(200, answers.loaded_answer(kind, asked.model, reason))

    async def _find(self, name: str) -> Model:
        return find(name, await self._completer.models())


def _required(model: str | None) -> str:
    if not model:
        raise InvalidArgument("body.model: expected the name of a model", path="model")
    return model


async def _say(exchange: Exchange, status: int, value: dict[str, Any]) -> None:
    await exchange.send(status, msgspec.json.encode(value))
