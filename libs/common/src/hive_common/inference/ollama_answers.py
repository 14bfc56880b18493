"""Answers in OpenAI's language as Ollama writes them: lines of JSON for streams, one object else."""

import datetime
import hashlib
import time
from typing import Any, Final, Literal

import msgspec

from hive_common.contracts.events import Model
from hive_common.inference.errors import error_headers, status_of
from hive_common.inference.exchange import Refusal
from hive_common.kernel.errors import Unavailable, body_of

NDJSON_TYPE: Final = "application/x-ndjson"
UNKNOWN_TIME: Final = "0001-01-01T00:00:00Z"
"""How Ollama, a Go program, writes that it does not know a time."""

Kind = Literal["chat", "generate"]


class _Function(msgspec.Struct, frozen=True):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(msgspec.Struct, frozen=True):
    index: int = 0
    id: str | None = None
    function: _Function = _Function()


class _Text(msgspec.Struct, frozen=True):
    """A message or a delta."""

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: tuple[_ToolCall, ...] | None = None


class _Choice(msgspec.Struct, frozen=True):
    delta: _Text | None = None
    message: _Text | None = None
    text: str | None = None
    finish_reason: str | None = None
    logprobs: dict[str, Any] | None = None


class _Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Answer(msgspec.Struct, frozen=True):
    """A completion, or a chunk of one."""

    choices: tuple[_Choice, ...] = ()
    usage: _Usage | None = None
    error: dict[str, Any] | str | None = None


class _Vector(msgspec.Struct, frozen=True):
    embedding: msgspec.Raw
    index: int = 0


class _Vectors(msgspec.Struct, frozen=True):
    data: tuple[_Vector, ...]
    usage: _Usage | None = None


_answers: Final = msgspec.json.Decoder(_Answer)
_vectors: Final = msgspec.json.Decoder(_Vectors)


def refusal_of(error: BaseException) -> Refusal:
    """Return the answer for an error in Ollama's shape."""
    body = body_of(error)
    return Refusal(status_of(body), error_headers(body), line({"error": body.message}).rstrip())


def line(value: dict[str, Any]) -> bytes:
    """Return a line of JSON."""
    return msgspec.json.encode(value) + b"\n"


def now() -> str:
    """Return the time as Ollama writes it."""
    return datetime.datetime.now(datetime.UTC).isoformat().replace("+00:00", "Z")


class _Calls:
    """Tool calls of a stream: their arguments come in pieces of text, and leave as objects."""

    def __init__(self) -> None:
        self._parts: dict[int, tuple[str, str, list[str]]] = {}

    def add(self, calls: tuple[_ToolCall, ...]) -> None:
        for number, call in enumerate(calls):
            index = call.index or number
            call_id, name, texts = self._parts.get(index, ("", "", []))
            texts.append(call.function.arguments or "")
            self._parts[index] = (call_id or call.id or "", name or call.function.name or "", texts)

    def take(self) -> list[dict[str, Any]]:
        found = []
        for call_id, name, texts in self._parts.values():
            text = "".join(texts) or "{}"
            try:
                arguments = msgspec.json.decode(text)
            except msgspec.DecodeError:
                # A model wrote no JSON: it goes on as what it wrote, and whoever called the model decides.
                arguments = {"text": text}
            function = {"name": name, "arguments": arguments}
            found.append({"function": function} | ({"id": call_id} if call_id else {}))
        self._parts.clear()
        return found


class Completions:
    """The `Shape` of `/api/chat` and `/api/generate`.

    Args:
        kind: which of them.
        model: as the client called it.
    """

    stream_type = NDJSON_TYPE

    def __init__(self, kind: Kind, model: str) -> None:
        self._kind = kind
        self._model = model
        self._began = time.perf_counter_ns()
        self._first = 0
        self._usage = _Usage()
        self._reason = ""
        self._calls = _Calls()
        self._over = False

    def whole(self, body: bytes) -> bytes:
        """Return the one object of an answer that is no stream."""
        self._first = self._began
        answer = self._read(body)
        self._usage = answer.usage or self._usage
        choice = answer.choices[0] if answer.choices else _Choice()
        self._reason = choice.finish_reason or "stop"
        said = self._said(choice, choice.message or _Text(content=choice.text))
        if self._kind == "chat" and (calls := self._calls.take()):
            said["message"]["tool_calls"] = calls
        return msgspec.json.encode(self._done(said))

    def piece(self, events: bytes) -> bytes:
        """Return a line for each event that says something."""
        return b"".join(self._line(data[5:].strip()) for data in events.split(b"\n") if data.startswith(b"data:"))

    def end(self) -> bytes:
        """Return nothing after the last line, else that the stream ended early."""
        return self.broken(Unavailable("the stream ended before the answer was complete"))

    def refusal(self, error: BaseException) -> Refusal:
        """Return an error in Ollama's shape."""
        return refusal_of(error)

    def broken(self, error: BaseException) -> bytes:
        """Return a line with the error, which clients raise; nothing after the last line or one."""
        if self._over:
            return b""
        self._over = True
        return line({"error": body_of(error).message})

    def _line(self, data: bytes) -> bytes:
        if self._over:
            return b""
        if data == b"[DONE]":
            return self._last()
        answer = self._read(data)
        if answer.error is not None:
            self._over = True
            return line({"error": _message(answer.error)})
        self._usage = answer.usage or self._usage
        if not answer.choices:
            return b""
        choice = answer.choices[0]
        self._reason = choice.finish_reason or self._reason
        text = choice.delta or _Text(content=choice.text)
        said = self._said(choice, text)
        if not text.content and not text.reasoning_content and not text.reasoning:
            return b""
        self._first = self._first or time.perf_counter_ns()
        return line(said | {"done": False})

    def _last(self) -> bytes:
        self._over = True
        said = self._said(_Choice(), _Text())
        calls = self._calls.take()
        before = b""
        if calls and self._kind == "chat":
            before = line(self._said(_Choice(), _Text(), calls) | {"done": False})
        return before + line(self._done(said))

    def _said(self, choice: _Choice, text: _Text, calls: list[dict[str, Any]] | None = None) -> dict[str, Any]:
        said: dict[str, Any] = {"model": self._model, "created_at": now()}
        thinking = text.reasoning_content or text.reasoning
        if self._kind == "chat":
            message: dict[str, Any] = {"role": "assistant", "content": text.content or ""}
            if thinking:
                message["thinking"] = thinking
            if calls:
                message["tool_calls"] = calls
            said["message"] = message
        else:
            said["response"] = text.content or ""
            if thinking:
                said["thinking"] = thinking
        if text.tool_calls:
            self._calls.add(text.tool_calls)
        if choice.logprobs and "content" in choice.logprobs:
            said["logprobs"] = [_logprob(one) for one in choice.logprobs["content"] or ()]
        return said

    def _done(self, said: dict[str, Any]) -> dict[str, Any]:
        end = time.perf_counter_ns()
        first = self._first or end
        return said | {
            "done": True,
            "done_reason": "length" if self._reason == "length" else "stop",
            "total_duration": end - self._began,
            "load_duration": 0,
            "prompt_eval_count": self._usage.prompt_tokens,
            "prompt_eval_duration": first - self._began,
            "eval_count": self._usage.completion_tokens,
            "eval_duration": end - first,
        }

    def _read(self, data: bytes) -> _Answer:
        try:
            return _answers.decode(data)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"what serves `{self._model}` answered something that cannot be read") from error


class Vectors:
    """The `Shape` of `/api/embed`, and of the older `/api/embeddings`.

    Args:
        model: as the client called it.
        older: one vector, and nothing else.
    """

    stream_type = NDJSON_TYPE

    def __init__(self, model: str, older: bool) -> None:
        self._model = model
        self._older = older
        self._began = time.perf_counter_ns()

    def whole(self, body: bytes) -> bytes:
        """Return the vectors, whose numbers pass as they are."""
        try:
            answer = _vectors.decode(body)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise Unavailable(f"what serves `{self._model}` answered something that cannot be read") from error
        vectors = [one.embedding for one in sorted(answer.data, key=lambda one: one.index)]
        if self._older:
            return msgspec.json.encode({"embedding": vectors[0] if vectors else []})
        said = {
            "model": self._model,
            "embeddings": vectors,
            "total_duration": time.perf_counter_ns() - self._began,
            "load_duration": 0,
            "prompt_eval_count": (answer.usage or _Usage()).prompt_tokens,
        }
        return msgspec.json.encode(said)

    def piece(self, events: bytes) -> bytes:
        """Return nothing: vectors are no stream."""
        return b""

    def end(self) -> bytes:
        """Return nothing."""
        return b""

    def refusal(self, error: BaseException) -> Refusal:
        """Return an error in Ollama's shape."""
        return refusal_of(error)

    def broken(self, error: BaseException) -> bytes:
        """Return a line with the error."""
        return line({"error": body_of(error).message})


def loaded_answer(kind: Kind, model: str, reason: str) -> bytes:
    """Return the answer to a call without a prompt, with which clients ask for a model to be loaded."""
    said: dict[str, Any] = {"model": model, "created_at": now(), "done": True, "done_reason": reason}
    said |= {"message": {"role": "assistant", "content": ""}} if kind == "chat" else {"response": ""}
    return msgspec.json.encode(said)


def listed(model: Model) -> dict[str, Any]:
    """Return a model as `/api/tags` lists it."""
    return {
        "name": model.name,
        "model": model.name,
        "modified_at": UNKNOWN_TIME,
        "size": model.size_bytes,
        "digest": _digest(model),
        "details": details(model),
    }


def running(model: Model) -> dict[str, Any]:
    """Return a model as `/api/ps` lists it."""
    loaded = {"expires_at": UNKNOWN_TIME, "size_vram": 0, "context_length": model.context_tokens}
    return {name: value for name, value in listed(model).items() if name != "modified_at"} | loaded


def details(model: Model) -> dict[str, Any]:
    """Return what is known of a model's make."""
    return {
        "parent_model": "",
        "format": "",
        "family": model.family,
        "families": [model.family] if model.family else [],
        "parameter_size": "",
        "quantization_level": model.quantisation,
    }


def shown(model: Model) -> dict[str, Any]:
    """Return a model as `/api/show` describes it."""
    family = model.family or "unknown"
    info: dict[str, Any] = {"general.architecture": family}
    if model.context_tokens:
        info[f"{family}.context_length"] = model.context_tokens
    return {
        "modelfile": "",
        "parameters": "",
        "template": "",
        "license": "",
        "modified_at": UNKNOWN_TIME,
        "details": details(model),
        "model_info": info,
        "capabilities": list(model.abilities or ("completion",)),
    }


def _digest(model: Model) -> str:
    # Clients show the first digits of it. Weights are not read here: it changes when what is known changes.
    known = f"{model.name}\n{model.size_bytes}\n{model.family}\n{model.quantisation}"
    return hashlib.sha256(known.encode()).hexdigest()


def _logprob(one: dict[str, Any]) -> dict[str, Any]:
    found = {"token": one.get("token", ""), "logprob": one.get("logprob", 0.0)}
    top = [{"token": t.get("token", ""), "logprob": t.get("logprob", 0.0)} for t in one.get("top_logprobs") or ()]
    return found | ({"top_logprobs": top} if top else {})


def _message(error: dict[str, Any] | str) -> str:
    return error if isinstance(error, str) else str(error.get("message", "the answer broke off"))
