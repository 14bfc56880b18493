"""The permission `http`: requests of a guest to the hosts it was granted, and to no other address than theirs.

A name is looked up once for each request and each redirect, what it leads to is checked, and the connection goes to
just that address: an answer of DNS that changes meanwhile changes nothing.
"""

import asyncio
import base64
import binascii
import re
import socket
import ssl
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

import aiohttp
import msgspec
from aiohttp.abc import AbstractResolver, ResolveResult
from hive_common.contracts.permissions import HttpPermission, Permissions
from hive_common.kernel.errors import (
    DeadlineExceeded,
    InvalidArgument,
    PayloadTooLarge,
    Unavailable,
)
from hive_common.kernel.ids import derive_id
from hive_common.permissions import check_http, denied
from hive_common.permissions.actions import http_action
from hive_common.permissions.hosts import PLAIN, Host, parse_host
from hive_common.permissions.lattice import READING
from multidict import CIMultiDict
from yarl import URL

from hive_executor.host.addresses import Resolver, problem_of
from hive_executor.host.approval import Approvals
from hive_executor.sandbox.model import HOST_ANSWER_BYTES_MAX, MEBIBYTE

URL_CHARACTERS_MAX: Final = 8_192
HEADERS_MAX: Final = 64
HEADERS_BYTES_MAX: Final = 32 << 10
ANSWER_BODY_BYTES_MAX: Final = 5 * MEBIBYTE
"""In base64 it still fits into the answer to a host call."""
ANSWER_LINE_BYTES_MAX: Final = 8_190
ANSWER_HEADERS_MAX: Final = 128
REDIRECTS_MAX: Final = 5
TIMEOUT_DEFAULT_MS: Final = 30_000
CONNECT_S_MAX: Final = 10.0

METHODS: Final = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
IDEMPOTENCY_KEY: Final = "Idempotency-Key"
_SAFE: Final = frozenset({"GET", "HEAD", "OPTIONS"})
_WITHOUT_BODY: Final = frozenset({"GET", "HEAD"})
_REDIRECTS: Final = frozenset({301, 302, 303, 307, 308})

# RFC 9110, section 5.6.2 and 5.5.
_TOKEN: Final = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,256}\Z")
_VALUE: Final = re.compile(r"[\t\x20-\x7e]*\Z")
_URL: Final = re.compile(r"[\x21-\x7e]+\Z")

_HOP_BY_HOP: Final = frozenset(
    {
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
"""They are about one connection, which is the host's (RFC 9110, section 7.6.1)."""
_OF_THE_HOST: Final = frozenset({"host", "content-length", "accept-encoding", "expect", "idempotency-key"})
_NOT_TOLD: Final = _HOP_BY_HOP | {"content-encoding", "content-length"}
"""They are about the body as it travelled, and it is given whole and unpacked."""

_ABOUT_BODY: Final = frozenset({"content-type", "content-language", "content-location"})
_TO_ANYBODY: Final = _ABOUT_BODY | {
    "accept",
    "accept-language",
    "cache-control",
    "if-modified-since",
    "if-none-match",
    "idempotency-key",
    "range",
    "user-agent",
}
"""What goes along to another host of a redirect: anything else could be a credential."""


class _Asked(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    url: str
    method: str = "GET"
    headers: dict[str, str] = {}
    body: str | None = None
    body_base64: str | None = None
    timeout_ms: int | None = None
    follow: bool = True


class _Answer(msgspec.Struct, frozen=True, omit_defaults=True):
    status: int
    url: str
    headers: tuple[tuple[str, str], ...]
    body: str | None = None
    body_base64: str | None = None


class Request(NamedTuple):
    """One request, as it goes out."""

    method: str
    url: URL
    headers: tuple[tuple[str, str], ...]
    body: bytes


class Answered(NamedTuple):
    """What came back, decoded."""

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    location: str


class HttpClient:
    """Sends requests to addresses that were looked up and checked before.

    Args:
        resolver: looks names up.
        context: verifies servers; by default with the system's store of certificates.
    """

    def __init__(self, resolver: Resolver, context: ssl.SSLContext | None = None) -> None:
        self._resolver = resolver
        self._context = context

    async def addresses(self, name: str, *, private: bool) -> Sequence[str]:
        """Look a name up, once.

        Raises:
            PermissionDenied: one of its addresses is of a kind that was not granted.
            Unavailable: it leads nowhere.
        """
        found = await self._resolver.addresses(name)
        if not found:
            raise Unavailable(f"{name} has no address")
        for address in found:
            if kind := problem_of(address, private=private):
                shown = "" if address == name else f"{name}, which leads to "
                raise denied("http", f"is not granted for {shown}{address} ({kind}; `permissions.http.private`)")
        return found

    async def send(self, request: Request, addresses: Sequence[str]) -> Answered:
        """Send a request to one of the addresses, the first that takes the connection; follow nothing.

        Raises:
            Unavailable: it cannot be reached, its certificate is no good, or what it says is not HTTP.
            PayloadTooLarge: it says more than a guest may be told.
        """
        connector = aiohttp.TCPConnector(
            resolver=_Fixed(addresses),
            use_dns_cache=False,
            # True: a context of the library with `ssl.create_default_context`, and thus the store of the system.
            ssl=self._context or True,
            force_close=True,
            socket_factory=lambda info: _socket_of(info, addresses),
        )
        session = aiohttp.ClientSession(
            connector=connector,
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S_MAX),
            skip_auto_headers=("User-Agent", "Accept", "Content-Type"),
            max_line_size=ANSWER_LINE_BYTES_MAX,
            max_field_size=ANSWER_LINE_BYTES_MAX,
            max_headers=ANSWER_HEADERS_MAX,
        )
        async with session:
            try:
                return await _exchange(session, request)
            except (aiohttp.ClientConnectorCertificateError, ssl.SSLCertVerificationError) as error:
                raise Unavailable(f"{request.url.raw_host} cannot prove who it is: {error}") from error
            except (aiohttp.ClientError, OSError, ValueError, TimeoutError) as error:
                text = str(error) or type(error).__name__
                raise Unavailable(f"{request.url.origin()} does not answer: {text[:300]}") from error


class HttpAccess:
    """Sends requests for one attempt.

    Args:
        client: sends them.
        permission: which hosts and methods.
        task, attempt: whose they are; servers are told by a key for each request that changes something.
        approvals: of the attempt. Where somebody is asked at each use, a redirect is told and not followed: where
            it leads to would be another use.
        replicated: several attempts of its task may run, so that only requests that change nothing are allowed.
    """

    def __init__(
        self,
        client: HttpClient,
        permission: HttpPermission,
        *,
        task: str = "",
        attempt: int = 0,
        approvals: Approvals | None = None,
        replicated: bool = False,
    ) -> None:
        self._replicated = replicated
        self._approvals = approvals or Approvals()
        self._client = client
        self._private = permission.private
        self._permissions = Permissions(http=permission)
        self._task = task
        self._attempt = attempt
        self._changing = 0

    async def call(self, operation: str, request: bytes, left_ms: int) -> bytes:
        """Answer one call; see `Capability`.

        Raises:
            PermissionDenied: host, method or address were not granted, also of a redirect.
            InvalidArgument: the request cannot be sent as it is.
            DeadlineExceeded: its time ran out.
            HiveError: what the client raises.
        """
        if operation != "request":
            raise InvalidArgument(f"http.{operation} does not exist; expected request")
        asked = _asked(request)
        timeout_ms = TIMEOUT_DEFAULT_MS if asked.timeout_ms is None else asked.timeout_ms
        if timeout_ms < 1:
            raise InvalidArgument(f"timeout_ms is {timeout_ms}; expected 1 or more", path="timeout_ms")
        first = self._request(asked)
        own = [(name, value) for name, value in first.headers if name != IDEMPOTENCY_KEY]
        await self._approvals.need(
            "http", lambda agent: http_action(agent, first.method, str(first.url), own, first.body)
        )
        follow = asked.follow and not self._approvals.asks("http")
        try:
            async with asyncio.timeout(min(timeout_ms, left_ms) / 1000):
                return await self._followed(first, follow)
        except TimeoutError as error:
            raise DeadlineExceeded(f"{first.url.origin()}: no answer within {timeout_ms} ms") from error

    def _request(self, asked: _Asked) -> Request:
        method = asked.method.upper()
        if method not in METHODS:
            raise InvalidArgument(
                f"method is {asked.method[:40]!r}; expected one of {', '.join(METHODS)}", path="method"
            )
        body = _body(asked)
        if body and method in _WITHOUT_BODY:
            raise InvalidArgument(f"a {method} request has no body", path="body")
        url = _url(asked.url)
        self._check(_host_of(url), method)
        headers = [*_checked_headers(asked.headers)]
        if method not in _SAFE:
            self._changing += 1
            key = derive_id("http", self._task, str(self._attempt), str(self._changing))
            headers.append((IDEMPOTENCY_KEY, key))
        return Request(method, url, tuple(headers), body)

    def _check(self, host: Host, method: str) -> None:
        if self._replicated and method not in READING:
            raise denied("http", f"covers only {' and '.join(READING)} in a replicated task, not {method!r}")
        check_http(self._permissions, host, method)

    async def _followed(self, request: Request, follow: bool) -> bytes:
        for _ in range(REDIRECTS_MAX + 1):
            host = _host_of(request.url)
            self._check(host, request.method)
            addresses = await self._client.addresses(host.name, private=self._private)
            answered = await self._client.send(request, addresses)
            if not follow or answered.status not in _REDIRECTS or not answered.location:
                return _encoded(request.url, answered)
            request = _redirected(request, answered)
        raise Unavailable(f"{request.url.origin()}: more than {REDIRECTS_MAX} redirects")


class _Fixed(AbstractResolver):
    """Knows one name, and looks nothing up."""

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = addresses

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in self._addresses
        ]

    async def close(self) -> None:
        """Nothing is open."""


def _socket_of(info: Any, addresses: Sequence[str]) -> socket.socket:
    family, kind, protocol, _, address = info
    # Every connection comes by here, whatever way the client found its address.
    if address[0] not in addresses:
        raise OSError(f"{address[0]} was not looked up for this request")
    return socket.socket(family, kind, protocol)


async def _exchange(session: aiohttp.ClientSession, request: Request) -> Answered:
    headers = CIMultiDict(request.headers)
    headers.setdefault("User-Agent", "HiveFabric")
    headers.setdefault("Accept", "*/*")
    headers["Accept-Encoding"] = "gzip"
    data = request.body if request.body or request.method not in _SAFE else None
    async with session.request(
        request.method, request.url, headers=headers, data=data, allow_redirects=False
    ) as answer:
        body = await _read(answer)
        # The raw ones: bytes beyond ASCII mean nothing (RFC 9110, section 5.5), and must not become surrogates.
        read = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in answer.raw_headers]
        named = tuple((name, value) for name, value in read if name.lower() not in _NOT_TOLD)
        return Answered(answer.status, named, body, answer.headers.get("Location", ""))


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    """Return the body, decoded as it comes: neither it nor what it says in few bytes gets past the limit."""
    coding = answer.headers.get("Content-Encoding", "").strip().lower()
    if coding not in {"", "identity", "gzip", "x-gzip"}:
        raise Unavailable(f"{answer.url.origin()} answers in {coding[:40]!r}; only gzip was asked for")
    unpacked = _Gzip() if coding.endswith("gzip") else None
    data, received = bytearray(), 0
    async for chunk in answer.content.iter_any():
        received += len(chunk)
        room = ANSWER_BODY_BYTES_MAX - len(data)
        data += chunk if unpacked is None else unpacked.feed(chunk, room + 1)
        if max(len(data), received) > ANSWER_BODY_BYTES_MAX:
            raise PayloadTooLarge(f"the answer has more than {ANSWER_BODY_BYTES_MAX} bytes")
    if unpacked is not None and received and not unpacked.is_whole:
        raise Unavailable(f"{answer.url.origin()}: the answer ends within its gzip stream")
    return bytes(data)


class _Gzip:
    """Unpacks gzip (RFC 1952), which may have several members, and never more than is asked for."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)

    @property
    def is_whole(self) -> bool:
        return self._member.eof

    def feed(self, data: bytes, bytes_max: int) -> bytes:
        unpacked = bytearray()
        while data and len(unpacked) < bytes_max:
            if self._member.eof:
                self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)
            try:
                unpacked += self._member.decompress(data, bytes_max - len(unpacked))
            except zlib.error as error:
                raise Unavailable(f"the answer is no gzip: {error}") from error
            # What is left over of a member that has not ended is over the limit.
            data = self._member.unused_data
        return bytes(unpacked)


def _asked(request: bytes) -> _Asked:
    try:
        return msgspec.json.decode(request, type=_Asked)
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"the request is not what http.request takes: {error}") from error


def _body(asked: _Asked) -> bytes:
    if asked.body is not None and asked.body_base64 is not None:
        raise InvalidArgument("body and body_base64: expected one of them", path="body_base64")
    if asked.body_base64 is None:
        return (asked.body or "").encode()
    try:
        return base64.b64decode(asked.body_base64, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidArgument(f"body_base64: {error}; expected base64", path="body_base64") from error


def _url(text: str) -> URL:
    if len(text) > URL_CHARACTERS_MAX or not _URL.match(text):
        raise InvalidArgument(
            f"url: expected up to {URL_CHARACTERS_MAX} ASCII characters without spaces and controls; "
            "others are percent-encoded",
            path="url",
        )
    try:
        url = URL(text)
        # What cannot be read shows only when it is asked for.
        _ = url.raw_host, url.port, url.raw_path_qs
    except (ValueError, IndexError) as error:  # the latter for brackets without a host
        raise InvalidArgument(f"url: {error}", path="url") from error
    if url.scheme not in {"http", "https"} or not url.raw_host:
        raise InvalidArgument(f"url: {text[:80]!r} is no https:// or http:// URL with a host", path="url")
    if url.raw_user is not None or url.raw_password is not None:
        raise InvalidArgument("url: has a user or a password; expected them in a header", path="url")
    return url.with_fragment(None)


def _host_of(url: URL) -> Host:
    name = url.raw_host or ""
    shown = f"[{name}]" if ":" in name else name
    plain = PLAIN if url.scheme == "http" else ""
    host = parse_host(f"{plain}{shown}:{url.port}")
    if host is None or host.below or host.name != name:
        raise InvalidArgument(
            f"url: {name[:80]!r} is no name of a host and no address as it is written", path="url"
        )
    return host


def _checked_headers(headers: dict[str, str]) -> Iterable[tuple[str, str]]:
    if (
        len(headers) > HEADERS_MAX
        or sum(len(name) + len(value) for name, value in headers.items()) > HEADERS_BYTES_MAX
    ):
        raise PayloadTooLarge(f"headers: expected {HEADERS_MAX} with {HEADERS_BYTES_MAX} bytes at most")
    for name, value in headers.items():
        path = f"headers.{name[:80]}"
        if not _TOKEN.match(name):
            raise InvalidArgument(f"headers: {name[:80]!r} is no name of a header (RFC 9110)", path=path)
        if name.lower() in _HOP_BY_HOP or name.lower().startswith("proxy-"):
            raise InvalidArgument(f"headers: {name!r} is about the connection, which is the host's", path=path)
        if name.lower() in _OF_THE_HOST:
            raise InvalidArgument(f"headers: {name!r} is set by the host", path=path)
        if not _VALUE.match(value):
            raise InvalidArgument(
                f"headers: the value of {name!r} has line breaks, controls or characters beyond ASCII", path=path
            )
        yield name, value


def _redirected(request: Request, answered: Answered) -> Request:
    """Return what follows a redirect (RFC 9110, section 15.4)."""
    try:
        url = _url(str(request.url.join(URL(answered.location))))
    except (ValueError, IndexError, InvalidArgument) as error:
        raise Unavailable(f"{request.url.origin()} redirects to what is no URL: {error}") from error
    method, body, headers = request.method, request.body, request.headers
    becomes_get = answered.status == 303 and method != "HEAD"
    if becomes_get or (answered.status in {301, 302} and method == "POST"):
        method, body = "GET", b""
        headers = tuple((n, v) for n, v in headers if n.lower() not in _ABOUT_BODY | {"idempotency-key"})
    if url.origin() != request.url.origin():
        headers = tuple((n, v) for n, v in headers if n.lower() in _TO_ANYBODY)
    return Request(method, url, headers, body)


def _encoded(url: URL, answered: Answered) -> bytes:
    answer = _Answer(answered.status, str(url), answered.headers)
    try:
        text = answered.body.decode()
    except UnicodeDecodeError:
        text = None
    if text is not None:
        encoded = msgspec.json.encode(msgspec.structs.replace(answer, body=text))
        # Control characters take six bytes each.
        if len(encoded) <= HOST_ANSWER_BYTES_MAX:
            return encoded
    whole = base64.b64encode(answered.body).decode()
    return msgspec.json.encode(msgspec.structs.replace(answer, body_base64=whole))
