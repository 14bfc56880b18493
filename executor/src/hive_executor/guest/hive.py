"""What an agent finds under `from hive import …`."""

import base64
import json
from collections.abc import Callable, Iterable
from typing import Any

from componentize_py_types import Err
from wit_world.imports import fork as _fork_host
from wit_world.imports import http as _http_host
from wit_world.imports import kv as _kv_host
from wit_world.imports import log as _log_host
from wit_world.imports import model as _model_host
from wit_world.imports import progress as _progress_host

_LEVELS = {
    "debug": _log_host.Level.DEBUG,
    "info": _log_host.Level.INFO,
    "warning": _log_host.Level.WARNING,
    "error": _log_host.Level.ERROR,
}


class Log:
    """The log of this attempt: `log.info("read %d files", n)`, or `log("text", level="warning")`."""

    def __call__(self, message: Any, *args: Any, level: str = "info") -> None:
        """Write a line. `args` are put into `message` with `%`, as in `logging`.

        Raises:
            ValueError: `level` is not one of debug, info, warning, error.
        """
        if level not in _LEVELS:
            raise ValueError(f"level is {level!r}; expected one of {', '.join(_LEVELS)}")
        text = str(message) % args if args else str(message)
        _log_host.write(_LEVELS[level], _utf8(text))

    def debug(self, message: Any, *args: Any) -> None:
        """Write a line that helps only while developing."""
        self(message, *args, level="debug")

    def info(self, message: Any, *args: Any) -> None:
        """Write a line that says what the agent does."""
        self(message, *args, level="info")

    def warning(self, message: Any, *args: Any) -> None:
        """Write a line about something unexpected that the agent got over."""
        self(message, *args, level="warning")

    def error(self, message: Any, *args: Any) -> None:
        """Write a line about something that failed."""
        self(message, *args, level="error")


class HostError(Exception):
    """Something that was asked of the host failed.

    Attributes:
        code: `not_found`, `invalid_argument`, `payload_too_large`, `rate_limited`, `unavailable`,
            `deadline_exceeded`, `budget_exhausted` (`max_tokens` or the quota of the manifest, or what its
            task, job or key may spend) or `internal`.
        message: one line for a person.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


class ModelError(HostError):
    """A model call that failed."""


class HttpError(HostError):
    """A request that got no answer. An answer with a status such as 404 is no error."""


class KvError(HostError):
    """A value that could not be read or written."""


class ForkError(HostError):
    """A child task that has no output."""


class Answer(dict[str, Any]):
    """The answer of OpenAI's API, as a dict, with short ways to what is mostly wanted."""

    @property
    def text(self) -> str:
        """The text of the first choice of a chat or a completion; empty where it has none."""
        choice = self["choices"][0]
        return (choice["message"].get("content") if "message" in choice else choice.get("text")) or ""

    @property
    def vectors(self) -> list[list[float]]:
        """The embeddings, in the order of what was given."""
        return [item["embedding"] for item in sorted(self["data"], key=lambda item: item["index"])]


class Model:
    """Language models, on this device or another one of the pool. It takes the permission `model`.

    Further options are those of OpenAI's API (`temperature`, `max_tokens`, `seed`, `tools`, `response_format` …)
    and go to the model as they are. Without the permission, or with a model that the manifest does not name, the
    attempt ends with `permission_denied`; no exception of Python says so.
    """

    def chat(self, messages: str | list[Any], *, model: str = "", **options: Any) -> Answer:
        """Ask for the next message of a chat: `model.chat("Hello").text`.

        Args:
            messages: as in OpenAI's API; a text is one message of the user.
            model: a name; without it, the first one of the manifest.

        Raises:
            ModelError: the call failed.
        """
        if isinstance(messages, str):
            messages = [{"role": "user", "content": messages}]
        return _asked(_model_host.chat, model, messages=messages, **options)

    def complete(self, prompt: str | list[Any], *, model: str = "", **options: Any) -> Answer:
        """Let a model continue a text. Arguments and errors as in `chat`."""
        return _asked(_model_host.complete, model, prompt=prompt, **options)

    def embed(self, input: str | list[Any], *, model: str = "", **options: Any) -> Answer:
        """Embed one or several texts: `model.embed(["a", "b"]).vectors`. Arguments and errors as in `chat`."""
        return _asked(_model_host.embed, model, input=input, **options)


def _asked(function: Callable[[str], str], model: str, **body: Any) -> Answer:
    return Answer(_host(function, ModelError, {"model": model, **body} if model else body))


class Response:
    """The answer to a request.

    Attributes:
        status: such as 200.
        url: where it came from, after redirects.
        headers: by name in lower case; of a name that comes several times, the values with `, ` between them.
        content: the body as bytes.
    """

    def __init__(self, answer: dict[str, Any]) -> None:
        self.status: int = answer["status"]
        self.url: str = answer["url"]
        self.headers: dict[str, str] = {}
        for name, value in answer["headers"]:
            before = self.headers.get(name.lower())
            self.headers[name.lower()] = value if before is None else f"{before}, {value}"
        if "body_base64" in answer:
            self.content = base64.b64decode(answer["body_base64"])
        else:
            self.content = answer.get("body", "").encode()

    @property
    def ok(self) -> bool:
        """Whether the status is 200 to 299."""
        return 200 <= self.status < 300

    @property
    def text(self) -> str:
        """The body as text; what is not UTF-8 in it becomes U+FFFD."""
        return self.content.decode("utf-8", "replace")

    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.content)


class Http:
    """Requests to the hosts that the manifest names. It takes the permission `http`.

    Without it, for another host or method, or where a name leads into a network that is not granted, the attempt
    ends with `permission_denied`; no exception of Python says so.
    """

    def request(
        self,
        method: str,
        url: str,
        *,
        headers: dict[str, str] | None = None,
        body: str | bytes | None = None,
        json: Any = None,
        timeout: float | None = None,
        follow: bool = True,
    ) -> Response:
        """Send a request and return the whole answer, whatever its status.

        Args:
            method: such as `POST`.
            url: `https://…`, or `http://…` where that is granted.
            headers: those about the connection, `Host` and lengths are the host's to set.
            body: text goes as UTF-8.
            json: goes as the body instead, with its content type.
            timeout: in seconds, for all of it; 30 without it.
            follow: redirects, within what is granted.

        Raises:
            HttpError: there is no answer.
        """
        asked: dict[str, Any] = {"url": url, "method": method, "follow": follow}
        asked["headers"] = dict(headers or {})
        if json is not None:
            body = _dumped(json)
            if not any(name.lower() == "content-type" for name in asked["headers"]):
                asked["headers"]["Content-Type"] = "application/json"
        if isinstance(body, bytes):
            asked["body_base64"] = base64.b64encode(body).decode()
        elif body is not None:
            asked["body"] = body
        if timeout is not None:
            asked["timeout_ms"] = max(1, int(timeout * 1000))
        return Response(_host(_http_host.request, HttpError, asked))

    def get(self, url: str, **options: Any) -> Response:
        """Send a GET request; arguments and errors as in `request`."""
        return self.request("GET", url, **options)

    def post(self, url: str, **options: Any) -> Response:
        """Send a POST request; arguments and errors as in `request`."""
        return self.request("POST", url, **options)


class Kv:
    """What this agent keeps from one task to the next. It takes the permission `kv`; without it the attempt ends.

    Values are what JSON can say. This attempt sees what it wrote; others see all of it once the attempt has
    succeeded and its task took its result, and nothing of an attempt that failed.
    """

    def get(self, key: str, default: Any = None) -> Any:
        """Return the value of a key, or `default`.

        Raises:
            KvError: it could not be read; so for the other methods.
        """
        return self._call(_kv_host.get, key=key).get("value", default)

    def put(self, key: str, value: Any) -> None:
        """Give a key a value."""
        self._call(_kv_host.put, key=key, value=value)

    def delete(self, key: str) -> None:
        """Remove a key, which need not be there."""
        self._call(_kv_host.delete, key=key)

    def list(self, prefix: str = "") -> "list[str]":
        """Return all keys that begin with `prefix`, in order."""
        keys: list[str] = []
        while True:
            found = self._call(_kv_host.keys, prefix=prefix, after=keys[-1] if keys else "")
            keys += found["keys"]
            if not found["more"]:
                return keys

    def _call(self, function: Callable[[str], str], **request: Any) -> Any:
        return _host(function, KvError, request)


class Fork:
    """Tasks for other agents: `fork("square", [{"n": 1}, {"n": 2}])`. It takes the permission `fork`; without it,
    for another agent, or for more tasks than it allows, the attempt ends.

    They begin once this attempt has succeeded; of an attempt that fails there are none. The job file reads what
    they give: `${tasks.<id>.forked}` is a list of `{agent, output}`.
    """

    def __call__(self, agent: str, inputs: "Iterable[dict[str, Any]]") -> int:
        """Fork one task for each input, and return how many this attempt has forked by now.

        `agent` is a name of the manifest's `permissions.fork.agents`, or one of its versions as `name@version`.

        Raises:
            TypeError: `inputs` is one input; expected a list of them.
            ForkError: they cannot be taken, such as inputs that are too large together. None of them is forked.
        """
        if isinstance(inputs, dict):
            raise TypeError("fork() takes a list of inputs; expected [{…}], got {…}")
        answer = _host(_fork_host.create, ForkError, {"agent": agent, "inputs": list(inputs)})
        return int(answer["children"])


def progress(fraction: float) -> None:
    """Say which part of the work is done: `progress(0.1)` for a tenth. It takes no permission, and costs little.

    Where the job says `hedge_after: {progress: 0.1, within: 5s}`, a second attempt starts beside one that has not
    said so in time.

    Args:
        fraction: more than 0, 1 at most, and never less than before.

    Raises:
        TypeError: it is not a number.
        ValueError: it is a number that cannot be meant.
    """
    if isinstance(fraction, bool) or not isinstance(fraction, int | float):
        raise TypeError(f"progress() takes a number; got {type(fraction).__name__}")
    if not 0 < fraction <= 1:
        raise ValueError(f"progress() takes more than 0, and 1 at most; got {fraction!r}")
    try:
        _host(_progress_host.mark, HostError, {"fraction": fraction})
    except HostError as error:
        if error.code != "invalid_argument":
            raise
        raise ValueError(error.message) from None


def _host(function: Callable[[str], str], error_type: type[HostError], request: dict[str, Any]) -> Any:
    try:
        return json.loads(function(_utf8(_dumped(request))))
    except Err as error:
        raise error_type(error.value.code, error.value.message) from None


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _utf8(text: str) -> str:
    # A lone surrogate has no UTF-8 form and would end the guest at the boundary.
    return text.encode("utf-8", "backslashreplace").decode()


log = Log()
model = Model()
http = Http()
kv = Kv()
fork = Fork()

__all__ = [
    "Answer",
    "ForkError",
    "HostError",
    "HttpError",
    "KvError",
    "ModelError",
    "Response",
    "fork",
    "http",
    "kv",
    "log",
    "model",
    "progress",
]
