"""Who may use the loopback port of a machine without a key: its own programs, and no page of the web.

A page that a browser shows can send requests to 127.0.0.1, and with a name of its own that it lets point there
(DNS rebinding) it could read the answers too. Browsers say which page asks, so such requests are refused.
"""

import ipaddress
from typing import Final
from urllib.parse import urlsplit

from hive_common.inference.exchange import App, Headers, Message, Receive, Scope, Send
from hive_common.kernel.errors import PermissionDenied

# Programs that show pages of their own, not of the web.
_LOCAL_SCHEMES: Final = frozenset({"app", "file", "tauri", "vscode-webview", "vscode-file"})
_METHODS: Final = b"GET, HEAD, POST, OPTIONS"


def check(scope: Scope) -> None:
    """Let a request pass that a program of this machine has made for itself.

    Raises:
        PermissionDenied: it comes from elsewhere, goes to another name, or was made by a page of the web.
    """
    client = scope.get("client")
    if client is not None and not is_loopback(client[0]):
        raise PermissionDenied("only programs of this machine may use this port without a key")
    host = urlsplit("//" + _header(scope, b"host")).hostname
    if host is None or not is_loopback(host):
        raise PermissionDenied("Host: expected localhost or 127.0.0.1, as programs of this machine say")
    origin = _header(scope, b"origin")
    if origin and not is_local_origin(origin):
        raise PermissionDenied("Origin: pages of the web may not use the models of this machine")
    if not origin and _header(scope, b"sec-fetch-site") == "cross-site":
        raise PermissionDenied("Sec-Fetch-Site: pages of the web may not use the models of this machine")


def is_loopback(host: str) -> bool:
    """Say whether a host name or address means this machine."""
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    mapped = address.ipv4_mapped if isinstance(address, ipaddress.IPv6Address) else None
    return (mapped or address).is_loopback


def is_local_origin(origin: str) -> bool:
    """Say whether an origin is a program of this machine, or a page that it serves itself."""
    parts = urlsplit(origin)
    if parts.scheme in _LOCAL_SCHEMES:
        return True
    return parts.scheme in ("http", "https") and parts.hostname is not None and is_loopback(parts.hostname)


class LoopbackOnly:
    """Refuses what `check` refuses, and tells browsers that local origins may read the answers.

    Args:
        app: answers what passes.
        refuse: writes a refusal in the language of the path.
    """

    def __init__(self, app: App, refuse: App) -> None:
        self._app = app
        self._refuse = refuse

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        try:
            check(scope)
        except PermissionDenied as error:
            scope["hive.refusal"] = error
            await self._refuse(scope, receive, send)
            return
        origin = _header(scope, b"origin")
        if not origin:
            await self._app(scope, receive, send)
            return
        allowed = _allowed(origin, _header(scope, b"access-control-request-headers"))
        if scope["method"] == "OPTIONS":
            await send({"type": "http.response.start", "status": 204, "headers": list(allowed)})
            await send({"type": "http.response.body", "body": b""})
            return

        async def send_allowed(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], *allowed]
            await send(message)

        await self._app(scope, receive, send_allowed)


def _allowed(origin: str, headers: str) -> Headers:
    found = [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-methods", _METHODS),
        (b"access-control-expose-headers", b"x-request-id, x-hive-route, x-hive-executor"),
        (b"vary", b"Origin"),
    ]
    return [*found, (b"access-control-allow-headers", headers.encode("latin-1"))] if headers else found


def _header(scope: Scope, name: bytes) -> str:
    for key, value in scope["headers"]:
        if key == name:
            return str(value, "latin-1")
    return ""
