"""The gateway's REST as the commands use it: one key, errors of the catalogue, patience while it is restarted."""

import json
import random
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import (
    CATALOGUE,
    ErrorBody,
    HiveError,
    Internal,
    NotFound,
    Unauthenticated,
    Unavailable,
)

from hive_cli.home import Home, elsewhere

_NOBODY = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""Trusts no certificate."""

PATIENCE_S = 60.0
"""How long a gateway may be away while its supervisor runs."""

STREAM_SILENCE_S = 30.0
"""A stream sends a heartbeat every ten seconds; without three of them it is dead."""

_DELAY_S = 0.1
_DELAY_MAX_S = 2.0
_RETRIED_STATUS = frozenset({502, 503, 504})


class ServerEvent(NamedTuple):
    """One server-sent event: its name, its id, and its data as text."""

    name: str
    id: str
    data: str


class Api:
    """A client of one installation. Every call is retried while the gateway is away; none of them is unsafe to
    repeat: submits carry an idempotency key, and the others are idempotent by nature.

    Args:
        home: names the address and the key.
        patience_s: how long to go on trying.

    Raises:
        Unavailable: nothing was ever started in this home.
        FailedPrecondition: it has joined an installation elsewhere, and holds no key for it.
    """

    def __init__(self, home: Home, patience_s: float = PATIENCE_S) -> None:
        if home.is_joined():
            raise elsewhere(home)
        if not home.exists():
            raise Unavailable(f"{home.root}: no installation here; start one with: hive up")
        self._home = home
        self._url = home.settings().endpoints.http
        self._patience_s = patience_s
        self._client = httpx.Client(
            base_url=self._url,
            headers={"authorization": f"Bearer {home.api_key()}"},
            timeout=httpx.Timeout(120.0, connect=5.0),
            trust_env=False,
            # To read whom to trust takes a twentieth of a second, and this door has no TLS.
            verify=_NOBODY if self._url.startswith("http:") else True,
        )

    def __enter__(self) -> "Api":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def get(self, path: str, **params: Any) -> Any:
        """GET a JSON document. Parameters that are None are left out."""
        return self._json(self._send("GET", path, params=_given(params)))

    def post(self, path: str, body: Any, headers: dict[str, str] | None = None) -> Any:
        """POST a JSON document and return the answer."""
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        sent = {"content-type": "application/json", **(headers or {})}
        return self._json(self._send("POST", path, content=content, headers=sent))

    def delete(self, path: str, **params: Any) -> Any:
        """DELETE and return the answer. Parameters that are None are left out."""
        return self._json(self._send("DELETE", path, params=_given(params)))

    def pages(self, path: str, key: str, cursor: str, **params: Any) -> Iterator[Any]:
        """Yield the items of every page.

        Args:
            path: of the list.
            key: member of the answer that holds the items.
            cursor: parameter that takes the answer's `next`.
            params: further parameters.
        """
        after: Any = params.pop(cursor, None)
        while True:
            page = self.get(path, **{cursor: after}, **params)
            yield from page[key]
            after = page.get("next")
            if after is None:
                return

    def get_blob(self, digest: str) -> bytes:
        """Fetch a blob and check it against its digest."""
        data = self._send("GET", f"/v1/blobs/{digest}").content
        if digest_of(data) != digest:
            raise Internal(f"the bytes of blob {digest} do not fit its name")
        return data

    def put_blob(self, data: bytes, digest: str) -> None:
        """Store a blob unless it is there."""
        try:
            self._send("HEAD", f"/v1/blobs/{digest}")
        except NotFound:
            headers = {"content-type": "application/octet-stream"}
            self._send("PUT", f"/v1/blobs/{digest}", content=data, headers=headers)

    @contextmanager
    def download(self, path: str, **params: Any) -> Iterator[Iterator[bytes]]:
        """GET something large in chunks. A connection that breaks raises Unavailable: nothing is resumed."""
        try:
            with self._client.stream("GET", path, params=_given(params)) as response:
                raise_for(response)
                yield response.iter_bytes()
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    @contextmanager
    def answer_events(self, path: str, body: Any) -> Iterator[tuple[dict[str, str], Iterator[ServerEvent]]]:
        """POST a document whose answer is a stream of events; yields its headers and the events.

        Nothing is sent again: what was said once would be said twice. A connection that breaks raises Unavailable.
        """
        content = json.dumps(body, ensure_ascii=False, separators=(",", ":")).encode()
        headers = {"content-type": "application/json", "accept": "text/event-stream"}
        timeout = httpx.Timeout(None, connect=5.0)
        try:
            with self._client.stream("POST", path, content=content, headers=headers, timeout=timeout) as response:
                raise_for(response)
                yield dict(response.headers), parse_events(response.iter_lines())
        except httpx.TransportError as error:
            raise self._unreachable(error) from error

    def events(self, path: str, last_id: str = "") -> Iterator[ServerEvent]:
        """Yield the events of a stream until `[DONE]`, through restarts of the gateway.

        Args:
            path: of the stream.
            last_id: id of the last event that was seen before.

        Raises:
            Unavailable: the gateway stayed away for longer than `patience_s`.
        """
        attempts = _Patience(self._patience_s)
        while True:
            try:
                for event in self._stream_once(path, last_id):
                    if event.data == "[DONE]":
                        return
                    if event.name == "error":
                        raise _problem(json.loads(event.data))
                    last_id = event.id or last_id
                    attempts.reset()
                    yield event
            except (httpx.TransportError, Unavailable) as error:
                self._wait_or_raise(attempts, error)
            else:
                self._wait_or_raise(attempts, Unavailable("the stream ended early"))

    def _stream_once(self, path: str, last_id: str) -> Iterator[ServerEvent]:
        headers = {"accept": "text/event-stream"} | ({"last-event-id": last_id} if last_id else {})
        timeout = httpx.Timeout(STREAM_SILENCE_S, connect=5.0)
        with self._client.stream("GET", path, headers=headers, timeout=timeout) as response:
            raise_for(response)
            yield from parse_events(response.iter_lines())

    def _send(self, method: str, path: str, **arguments: Any) -> httpx.Response:
        attempts = _Patience(self._patience_s)
        while True:
            try:
                response = self._client.request(method, path, **arguments)
                raise_for(response)
                return response
            except Unauthenticated as error:
                file = self._home.api_key_file
                raise Unauthenticated(
                    f"{file}: {self._url} does not take this key; expected the one that `hive up` wrote there",
                    file=str(file),
                ) from error
            except (httpx.TransportError, Unavailable) as error:
                self._wait_or_raise(attempts, error)

    def _wait_or_raise(self, attempts: "_Patience", error: Exception) -> None:
        # Without a supervisor nothing will come back; with one, it is about to.
        if self._home.supervisor_pid() is None or not attempts.wait():
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> HiveError:
        if self._home.supervisor_pid() is None:
            return Unavailable(
                f"nothing runs in {self._home.root}; start it with: hive up --home {self._home.root}"
            )
        if isinstance(error, HiveError):
            return error
        return Unavailable(f"{self._url} cannot be reached: {error or type(error).__name__}")

    @staticmethod
    def _json(response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise Internal(f"{response.url}: the answer is not JSON") from error


class _Patience:
    """Delays that grow, until the time is over."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self.reset()

    def reset(self) -> None:
        self._until = time.monotonic() + self._seconds
        self._delay_s = _DELAY_S

    def wait(self) -> bool:
        """Sleep a little and say whether to try again."""
        if time.monotonic() + self._delay_s > self._until:
            return False
        time.sleep(self._delay_s * random.uniform(0.5, 1.0))  # noqa: S311 - jitter
        self._delay_s = min(self._delay_s * 2, _DELAY_MAX_S)
        return True


def parse_events(lines: Iterator[str]) -> Iterator[ServerEvent]:
    """Take server-sent events out of lines (WHATWG HTML, section 9.2.6)."""
    name, event_id = "", ""
    data: list[str] = []
    for line in lines:
        if not line:
            if data:
                yield ServerEvent(name or "message", event_id, "\n".join(data))
            name, data = "", []
            continue
        field, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match field:
            case "event":
                name = value
            case "id":
                event_id = value
            case "data":
                data.append(value)


def raise_for(response: httpx.Response) -> None:
    """Raise the error of the catalogue that an answer carries, if it is one."""
    if response.is_success:
        return
    response.read()
    try:
        problem = response.json()
    except ValueError:
        problem = {}
    if isinstance(problem, dict) and isinstance(problem.get("error"), dict):
        raise openai_error(problem["error"], response.status_code)
    if not isinstance(problem, dict) or "code" not in problem:
        problem = {"code": _code_of(response.status_code), "detail": _bare(response)}
    raise _problem(problem)


def openai_error(error: dict[str, Any], status: int = 500) -> HiveError:
    """Return the error of the catalogue for one in OpenAI's shape, which has codes of its own."""
    code = error.get("code")
    return _problem({"code": code if code in CATALOGUE else _code_of(status), "detail": error.get("message")})


def _bare(response: httpx.Response) -> str:
    return f"{response.request.method} {response.request.url.path}: status {response.status_code}"


def _code_of(status: int) -> str:
    if status in _RETRIED_STATUS:
        return "unavailable"
    for code, mapping in CATALOGUE.items():
        if mapping.http_status == status:
            return code
    return "internal"


def _problem(problem: dict[str, Any]) -> HiveError:
    known = {"type", "title", "status", "detail", "code", "retryable"}
    fields = {name: value for name, value in problem.items() if name not in known}
    message = str(problem.get("detail") or problem.get("title") or problem["code"])
    return ErrorBody(str(problem["code"]), message, bool(problem.get("retryable")), fields).raised()


def _given(params: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in params.items() if value is not None}
