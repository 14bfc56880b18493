"""Around every HTTP call: the key, and the metrics. Plain ASGI, so that streams pass untouched."""

import functools
import time

from hive_common.inference import loopback
from hive_common.inference.ollama import Ollama
from hive_common.kernel.errors import HiveError, Unauthenticated
from hive_common.ops.telemetry import DURATION, IN_FLIGHT, REQUESTS
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hive_gateway.devices import Devices, is_assertion
from hive_gateway.holders import Holders
from hive_gateway.keys import Caller, bearer_of
from hive_gateway.problems import CLIENT_CLOSED, error_response
from hive_gateway.rights import check_path

CALLER = "hive.caller"
"""Where the scope of a call carries its `Caller`."""

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/v1/ca"})
OPEN_CALLS = frozenset({("POST", "/v1/executors/enrol")})
"""Of these paths only the one method needs no key."""

# Finding the series of some labels takes longer than counting; there are as many as series.
_requests = functools.cache(REQUESTS.labels)
_duration = functools.cache(DURATION.labels)

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class Authenticated:
    """Lets nobody through without a key, but to what `is_open`; a wrong path tells a stranger nothing either.

    Args:
        app: what is behind it.
        keys: who may call.
        devices: executors, which show what they have signed in place of a key.
        without_key: who calls the Ollama paths without a key, from this machine and from no page of the web; None:
            nobody does.
    """

    def __init__(self, app: ASGIApp, keys: Holders, devices: Devices, without_key: Caller | None = None) -> None:
        self._app = app
        self._keys = keys
        self._devices = devices
        self._without_key = without_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http" and not is_open(scope):
            try:
                caller = await self._caller(scope)
                check_path(caller, scope["method"], scope["path"])
            except HiveError as error:
                await error_response(scope["path"], error)(scope, receive, send)
                return
            scope[CALLER] = caller
        await self._app(scope, receive, send)

    async def _caller(self, scope: Scope) -> Caller:
        authorization = Headers(scope=scope).get("authorization")
        token = bearer_of(authorization)
        if is_assertion(token):
            return await self._devices.caller(token)
        if authorization is not None or not Ollama.route(scope["path"]):
            return await self._keys.caller(authorization)
        if self._without_key is None:
            raise Unauthenticated(
                "this needs an API key: expected the header `Authorization: Bearer <key>`; programs of this machine"
                " that send none can be let in with: hive up --ollama-without-key"
            )
        loopback.check(scope)
        return self._without_key


class Measured:
    """Counts calls by route and status, and measures the time to the first byte of the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start = time.perf_counter()
        answered = False

        async def measure(message: Message) -> None:
            nonlocal answered
            if message["type"] == "http.response.start":
                answered = True
                route = route_of(scope)
                _duration(route).observe(time.perf_counter() - start)
                _requests(route, str(message["status"])).inc()
            await send(message)

        try:
            with IN_FLIGHT.track_inprogress():
                await self._app(scope, receive, measure)
        finally:
            if not answered:
                _requests(route_of(scope), str(CLIENT_CLOSED)).inc()


def is_open(scope: Scope) -> bool:
    """Say whether an HTTP call needs no key."""
    return scope["path"] in OPEN_PATHS or (scope["method"], scope["path"]) in OPEN_CALLS


def route_of(scope: Scope) -> str:
    """Return method and path template of a call: a label may not grow with what callers make up."""
    path = getattr(scope.get("route"), "path", None)
    method = scope["method"] if scope["method"] in _METHODS else "OTHER"
    return f"{method} {path}" if path else "unmatched"
