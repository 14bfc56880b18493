"""OpenAI's API over a `Completer`: bodies pass through as the bytes they are."""

from collections.abc import Sequence
from types import MappingProxyType
from typing import Final

import msgspec

from hive_common.contracts.events import Model
from hive_common.inference.bodies import decode
from hive_common.inference.calls import PATHS, Completer, Endpoint, OfferedModel
from hive_common.inference.errors import openai_error, openai_refusal
from hive_common.inference.exchange import (
    SSE_TYPE,
    Callers,
    ClientGone,
    Exchange,
    Receive,
    Refusal,
    Scope,
    Send,
)
from hive_common.inference.names import same_model, unknown_model
from hive_common.kernel.errors import ErrorBody, InvalidArgument, NotFound, Unavailable, body_of

MODELS_PATH: Final = "/v1/models"
DONE: Final = b"data: [DONE]"

_ENDPOINTS: Final = MappingProxyType({path: endpoint for endpoint, path in PATHS.items()})


class ModelView(msgspec.Struct, frozen=True):
    """A model as OpenAI describes one, and what else is known of it."""

    id: str
    object: str
    created: int
    owned_by: str
    executors: tuple[str, ...]
    family: str
    size_bytes: int
    quantisation: str
    context_tokens: int
    loaded: bool
    providers: tuple[str, ...]


class ModelList(msgspec.Struct, frozen=True):
    """All models that can be called."""

    object: str
    data: tuple[ModelView, ...]


class _Asked(msgspec.Struct, frozen=True):
    """What routing needs of a body."""

    model: str
    stream: bool | None = None


class OpenAIShape:
    """Answers pass; what is added is the end of a stream that has none."""

    stream_type = SSE_TYPE

    def __init__(self) -> None:
        self._last = b""

    def whole(self, body: bytes) -> bytes:
        """Return it as it is."""
        return body

    def piece(self, events: bytes) -> bytes:
        """Return them as they are."""
        self._last = events or self._last
        return events

    def end(self) -> bytes:
        """Return nothing after `[DONE]` or an error, else that the stream ended early."""
        return self.broken(Unavailable("the stream ended before the answer was complete"))

    def refusal(self, error: BaseException) -> Refusal:
        """Return an error in OpenAI's shape."""
        return openai_refusal(body_of(error))

    def broken(self, error: BaseException) -> bytes:
        """Return an event with the error in OpenAI's shape, which clients raise; nothing after `[DONE]` or one."""
        last_line = self._last.rstrip().rpartition(b"\n")[2]
        if last_line == DONE or b'"error"' in self._last:
            return b""
        return b"data: " + msgspec.json.encode(openai_error(body_of(error))) + b"\n\n"


class OpenAI:
    """An ASGI application that takes `PATHS` and the models' paths.

    Args:
        completer: serves the calls.
        callers: says who calls.
    """

    def __init__(self, completer: Completer, callers: Callers) -> None:
        self._completer = completer
        self._callers = callers

    @staticmethod
    def route(path: str) -> str | None:
        """Return the template of a path that is answered here, else None."""
        if path in _ENDPOINTS or path == MODELS_PATH:
            return path
        return f"{MODELS_PATH}/{{id}}" if path.startswith(MODELS_PATH + "/") else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        exchange = Exchange(scope, receive, send)
        try:
            await self._answer(scope, exchange)
        except ClientGone:
            # Nobody is left who could be told.
            return
        except Exception as error:  # noqa: BLE001 - whatever is raised becomes an answer
            await exchange.fail(error, OpenAIShape())

    async def _answer(self, scope: Scope, exchange: Exchange) -> None:
        path, method = scope["path"], scope["method"]
        endpoint = _ENDPOINTS.get(path)
        if method != ("POST" if endpoint else "GET") or self.route(path) is None:
            await self._no_such(method, path, exchange)
        elif endpoint:
            await self._complete(endpoint, scope, exchange)
        elif path == MODELS_PATH:
            self._callers(scope)
            listed = ModelList("list", tuple(map(view_of, await self._completer.models())))
            await exchange.send(200, msgspec.json.encode(listed))
        else:
            self._callers(scope)
            name = path.removeprefix(MODELS_PATH + "/")
            await exchange.send(200, msgspec.json.encode(view_of(find(name, await self._completer.models()))))

    async def _complete(self, endpoint: Endpoint, scope: Scope, exchange: Exchange) -> None:
        caller = self._callers(scope)
        body = await exchange.body()
        asked = decode(body, _Asked)
        if not asked.model:
            raise InvalidArgument("body.model: expected the name of a model", path="model")
        stream = bool(asked.stream) and endpoint != "embeddings"
        call = exchange.call(caller, endpoint, asked.model, body, stream)
        await exchange.complete(self._completer, call, OpenAIShape())

    async def _no_such(self, method: str, path: str, exchange: Exchange) -> None:
        if self.route(path) is None:
            raise NotFound(f"there is nothing at {path}")
        allowed = "POST" if path in _ENDPOINTS else "GET"
        error = ErrorBody("method_not_allowed", f"{method} is not allowed on {path}; expected {allowed}")
        shown = msgspec.json.encode(openai_error(error, 405))
        await exchange.send(405, shown, headers=[(b"allow", allowed.encode())])


def view_of(model: Model) -> ModelView:
    """Return a model as OpenAI describes one."""
    return ModelView(
        id=model.name,
        object="model",
        created=0,
        owned_by="hivefabric",
        executors=model.executors if isinstance(model, OfferedModel) else (),
        family=model.family,
        size_bytes=model.size_bytes,
        quantisation=model.quantisation,
        context_tokens=model.context_tokens,
        loaded=model.loaded,
        providers=model.providers if isinstance(model, OfferedModel) else (),
    )


def find(name: str, models: Sequence[Model]) -> Model:
    """Return the model of that name.

    Raises:
        NotFound: with the nearest names.
    """
    if (model := same_model(name, models)) is not None:
        return model
    raise unknown_model(name, [model.name for model in models])
