"""The model surfaces before FastAPI: what they take goes past it, everything else to it."""

from collections.abc import Callable
from types import SimpleNamespace

from hive_common.inference.calls import Completer
from hive_common.inference.exchange import Caller
from hive_common.inference.ollama import Ollama
from hive_common.inference.openai import OpenAI
from starlette.types import ASGIApp, Receive, Scope, Send

from hive_gateway.middleware import CALLER


class Surfaces:
    """Answers the model paths, and passes on everything else.

    Args:
        app: answers the rest.
        completer: serves the calls.
    """

    def __init__(self, app: ASGIApp, completer: Completer) -> None:
        self._app = app
        self._surfaces: tuple[tuple[Callable[[str], str | None], ASGIApp], ...] = (
            (OpenAI.route, OpenAI(completer, caller_of)),
            (Ollama.route, Ollama(completer, caller_of)),
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http":
            for route_of, surface in self._surfaces:
                if route := route_of(scope["path"]):
                    # The label of its metrics.
                    scope["route"] = SimpleNamespace(path=route)
                    return await surface(scope, receive, send)
        await self._app(scope, receive, send)


def caller_of(scope: Scope) -> Caller:
    """Return what model calls need to know of who showed the key."""
    shown = scope[CALLER]
    return Caller(shown.pseudonym, shown.name, shown.pin, shown.counts_only, shown.cloud)
