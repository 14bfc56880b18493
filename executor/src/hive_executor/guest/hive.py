"""What an agent finds under `from hive import …`."""

import json
from collections.abc import Callable
from typing import Any

from componentize_py_types import Err
from wit_world.imports import log as _log_host
from wit_world.imports import model as _model_host

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


class ModelError(Exception):
    """A model call that failed.

    Attributes:
        code: `not_found`, `invalid_argument`, `payload_too_large`, `rate_limited`, `unavailable`,
            `deadline_exceeded`, `budget_exhausted` (the manifest's `max_tokens` are used up) or `internal`.
        message: one line for a person.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


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
    try:
        request = json.dumps({"model": model, **body} if model else body, ensure_ascii=False)
        return Answer(json.loads(function(_utf8(request))))
    except Err as error:
        raise ModelError(error.value.code, error.value.message) from None


def _utf8(text: str) -> str:
    # A lone surrogate has no UTF-8 form and would end the guest at the boundary.
    return text.encode("utf-8", "backslashreplace").decode()


log = Log()
model = Model()

__all__ = ["Answer", "ModelError", "log", "model"]
