"""Around every HTTP call: the key, and the metrics. Plain ASGI, so that streams pass untouched."""

import time

from hive_common.kernel.errors import HiveError, PermissionDenied
from hive_common.ops.telemetry import DURATION, IN_FLIGHT, REQUESTS
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hive_gateway.keys import KeyRing, may_use
from hive_gateway.problems import CLIENT_CLOSED, error_response

CALLER = "hive.caller"
"""Where the scope of a call carries its `Caller`."""

OPEN_PATHS = frozenset({"/healthz", "/readyz", "/v1/ca"})
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"})


class Authenticated:
    """Lets nobody through without a key, but to `OPEN_PATHS`; a wrong path tells a stranger nothing either."""

    def __init__(self, app: ASGIApp, keys: KeyRing) -> None:
        self._app = app
        self._keys = keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] == "http" and scope["path"] not in OPEN_PATHS:
            try:
                caller = self._keys.caller(Headers(scope=scope).get("authorization"))
                if not may_use(caller, scope["path"]):
                    raise PermissionDenied(
                        f"the key `{caller.name}` may only read and write blobs", scope=caller.scope
                    )
            except HiveError as error:
                await error_response(scope["path"], error)(scope, receive, send)
                return
            scope[CALLER] = caller
        await self._app(scope, receive, send)


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
                DURATION.labels(route).observe(time.perf_counter() - start)
                REQUESTS.labels(route, str(message["status"])).inc()
            await send(message)

        try:
            with IN_FLIGHT.track_inprogress():
                await self._app(scope, receive, measure)
        finally:
            if not answered:
                REQUESTS.labels(route_of(scope), str(CLIENT_CLOSED)).inc()


def route_of(scope: Scope) -> str:
    """Return method and path template of a call: a label may not grow with what callers make up."""
    path = getattr(scope.get("route"), "path", None)
    method = scope["method"] if scope["method"] in _METHODS else "OTHER"
    return f"{method} {path}" if path else "unmatched"
