"""Ollama's requests in OpenAI's language. Pure: bytes and structs in, bytes out.

Fields and defaults are those of Ollama's API documentation (docs/api.md of its repository).
"""

import base64
import binascii
from typing import Any, Final

import msgspec

from hive_common.kernel.errors import InvalidArgument

# Options whose names OpenAI's API has, or that llama.cpp and vLLM take beside it. Those that say how a model is
# loaded (`num_ctx`, `num_gpu`, …) mean nothing here: what serves the model has loaded it already.
_OPTIONS: Final = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "typical_p",
    "seed",
    "stop",
    "presence_penalty",
    "frequency_penalty",
    "repeat_penalty",
    "repeat_last_n",
)
# What msgspec.Raw holds where there is null; it takes no other type beside it.
_NULL: Final = msgspec.Raw(b"null")
_IMAGES: Final = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif", b"RIFF": "webp"}


class Function(msgspec.Struct, frozen=True):
    """What a model wants called. `arguments` is a JSON object."""

    name: str
    arguments: msgspec.Raw = msgspec.Raw(b"{}")


class ToolCall(msgspec.Struct, frozen=True):
    """A call of a tool, in a message of the assistant."""

    function: Function
    id: str = ""


class Message(msgspec.Struct, frozen=True):
    """A message of a conversation."""

    role: str
    content: str | None = None
    thinking: str | None = None
    images: tuple[str, ...] | None = None
    tool_calls: tuple[ToolCall, ...] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """What `/api/chat` and `/api/generate` have in common."""

    model: str
    stream: bool | None = None
    format: msgspec.Raw = _NULL
    options: dict[str, msgspec.Raw] | None = None
    keep_alive: msgspec.Raw = _NULL
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None


class Chat(Asked, frozen=True, kw_only=True):
    """`POST /api/chat`."""

    messages: tuple[Message, ...] | None = None
    tools: msgspec.Raw = _NULL


class Generate(Asked, frozen=True, kw_only=True):
    """`POST /api/generate`."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: tuple[int, ...] | None = None
    raw: bool | None = None
    images: tuple[str, ...] | None = None


class Embed(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/embed`."""

    model: str
    input: str | tuple[str, ...] | None = None
    dimensions: int | None = None


class Embeddings(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/embeddings`, the older form."""

    model: str
    prompt: str | None = None


class Named(msgspec.Struct, frozen=True, kw_only=True):
    """`POST /api/show`. Old clients say `name`."""

    model: str | None = None
    name: str | None = None


def chat_body(asked: Chat) -> bytes:
    """Return the body of a chat completion. Raises InvalidArgument where it cannot be said in OpenAI's language."""
    body = {"model": asked.model, "messages": _messages(asked.messages or ()), **_common(asked)}
    if asked.tools != _NULL:
        body["tools"] = asked.tools
    if asked.logprobs:
        body |= {"logprobs": True, "top_logprobs": asked.top_logprobs or 0}
    return msgspec.json.encode(body)


def generate_is_raw(asked: Generate) -> bool:
    """Say whether the prompt goes to the model without a conversation's template around it."""
    return bool(asked.raw) or bool(asked.suffix)


def generate_body(asked: Generate) -> bytes:
    """Return the body of a chat completion, or of a completion where `generate_is_raw`.

    Raises:
        InvalidArgument: it wants what OpenAI's language cannot say.
    """
    if asked.template:
        raise InvalidArgument(
            "body.template: templates are applied where the model is served; expected `raw` and the whole prompt",
            path="template",
        )
    if asked.context:
        raise InvalidArgument(
            "body.context: tokens of earlier answers are not kept here; expected the conversation on /api/chat",
            path="context",
        )
    if generate_is_raw(asked):
        body = {"model": asked.model, "prompt": asked.prompt or "", **_common(asked)}
        if asked.suffix:
            body["suffix"] = asked.suffix
        if asked.logprobs:
            body["logprobs"] = asked.top_logprobs or 1
        return msgspec.json.encode(body)
    messages = [Message("system", asked.system)] if asked.system else []
    messages.append(Message("user", asked.prompt or "", images=asked.images))
    body = {"model": asked.model, "messages": _messages(tuple(messages)), **_common(asked)}
    if asked.logprobs:
        body |= {"logprobs": True, "top_logprobs": asked.top_logprobs or 0}
    return msgspec.json.encode(body)


def embed_body(asked: Embed) -> bytes:
    """Return the body of an embeddings call."""
    body: dict[str, Any] = {"model": asked.model, "input": asked.input, "encoding_format": "float"}
    if asked.dimensions:
        body["dimensions"] = asked.dimensions
    return msgspec.json.encode(body)


def unloads(asked: Asked) -> bool:
    """Say whether a call without a prompt wants its model out of memory."""
    return msgspec.json.decode(asked.keep_alive) in (0, "0", "0s")


def streams(asked: Asked) -> bool:
    """Say whether the answer comes in lines, which is the default."""
    return asked.stream is not False


def _common(asked: Asked) -> dict[str, Any]:
    options = asked.options or {}
    body: dict[str, Any] = {name: options[name] for name in _OPTIONS if options.get(name, _NULL) != _NULL}
    limit = _int(options.get("num_predict", _NULL), "options.num_predict")
    # -1 and -2 mean that there is no limit.
    if limit is not None and limit >= 0:
        body["max_tokens"] = limit
    if (form := _response_format(asked.format)) is not None:
        body["response_format"] = form
    if isinstance(asked.think, str):
        body["reasoning_effort"] = asked.think
    elif asked.think is False:
        body["reasoning_effort"] = "none"
    if streams(asked):
        body |= {"stream": True, "stream_options": {"include_usage": True}}
    return body


def _response_format(raw: msgspec.Raw) -> dict[str, Any] | None:
    form = msgspec.json.decode(raw)
    if form in ("", None):
        return None
    if form == "json":
        return {"type": "json_object"}
    if isinstance(form, dict):
        return {"type": "json_schema", "json_schema": {"name": "answer", "schema": raw, "strict": True}}
    raise InvalidArgument('body.format: expected "json" or a JSON schema', path="format")


def _int(raw: msgspec.Raw, path: str) -> int | None:
    try:
        return msgspec.json.decode(raw, type=int | None)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"body.{path}: {error}", path=path) from error


def _messages(messages: tuple[Message, ...]) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    # Ollama's messages of tools name the tool, OpenAI's the call: they answer the calls before them in order.
    open_calls: list[tuple[str, str]] = []
    for number, message in enumerate(messages):
        shown: dict[str, Any] = {"role": message.role, "content": _content(message, number)}
        if message.thinking:
            shown["reasoning_content"] = message.thinking
        if message.tool_calls:
            calls = [_tool_call(call, f"call_{number}_{i}") for i, call in enumerate(message.tool_calls)]
            open_calls = [(call["id"], call["function"]["name"]) for call in calls]
            shown["tool_calls"] = calls
        if message.role == "tool":
            shown["tool_call_id"] = message.tool_call_id or _answered(open_calls, message.tool_name)
        found.append(shown)
    return found


def _tool_call(call: ToolCall, made_id: str) -> dict[str, Any]:
    function = {"name": call.function.name, "arguments": str(bytes(call.function.arguments), "utf-8")}
    return {"id": call.id or made_id, "type": "function", "function": function}


def _answered(open_calls: list[tuple[str, str]], name: str | None) -> str:
    for index, (call_id, called) in enumerate(open_calls):
        if not name or called == name:
            del open_calls[index]
            return call_id
    return "call_unknown"


def _content(message: Message, number: int) -> str | list[dict[str, Any]]:
    if not message.images:
        return message.content or ""
    parts: list[dict[str, Any]] = [{"type": "text", "text": message.content or ""}]
    parts += [{"type": "image_url", "image_url": {"url": _data_url(image, number)}} for image in message.images]
    return parts


def _data_url(image: str, number: int) -> str:
    try:
        start = base64.b64decode(image[:16], validate=True)
    except binascii.Error as error:
        path = f"messages[{number}].images"
        raise InvalidArgument(f"body.{path}: expected images in base64", path=path) from error
    kind = next((kind for magic, kind in _IMAGES.items() if start.startswith(magic)), "png")
    return f"data:image/{kind};base64,{image}"
