"""The bytes of scripted answers, whole and in events, in OpenAI's shape."""

import functools
from typing import Any

import msgspec

from hive_common.testing.scripted.listings import CREATED
from hive_common.testing.scripted.script import text_of


class Chat:
    """A chat answer, streamed and whole."""

    kind = "chat.completion.chunk"

    def __init__(self, model: str, words: int, has_usage: bool) -> None:
        self.model = model
        self.words = words
        self.has_usage = has_usage

    def first(self) -> bytes:
        """Return what stands before the first token."""
        return _event(
            self.kind, self.model, '{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}'
        )

    def token(self, number: int) -> bytes:
        """Return the event of a token."""
        return _chat_token(self.model, number)

    def last(self, tokens: int, reason: str) -> bytes:
        """Return what follows the last token."""
        end = _event(self.kind, self.model, f'{{"index":0,"delta":{{}},"finish_reason":"{reason}"}}')
        return end + self._usage(tokens)

    def whole(self, tokens: int, reason: str) -> bytes:
        """Return the answer that is not streamed."""
        message = {"role": "assistant", "content": text_of(tokens)}
        choice = {"index": 0, "message": message, "finish_reason": reason, "logprobs": None}
        return _whole("chat.completion", self.model, choice, self.words, tokens)

    def _usage(self, tokens: int) -> bytes:
        if not self.has_usage:
            return b""
        body = {
            "id": "scripted",
            "object": self.kind,
            "created": CREATED,
            "model": self.model,
            "choices": [],
            "usage": _usage(self.words, tokens),
        }
        return b"data: %b\n\n" % msgspec.json.encode(body)


class Completion(Chat):
    """A completion, streamed and whole."""

    kind = "text_completion"

    def first(self) -> bytes:
        """Return what stands before the first token."""
        return b""

    def token(self, number: int) -> bytes:
        """Return the event of a token."""
        return _completion_token(self.model, number)

    def last(self, tokens: int, reason: str) -> bytes:
        """Return what follows the last token."""
        end = _event(self.kind, self.model, f'{{"index":0,"text":"","finish_reason":"{reason}"}}')
        return end + self._usage(tokens)

    def whole(self, tokens: int, reason: str) -> bytes:
        """Return the answer that is not streamed."""
        choice = {"index": 0, "text": text_of(tokens), "finish_reason": reason, "logprobs": None}
        return _whole("text_completion", self.model, choice, self.words, tokens)


class ToolCall(Chat):
    """A call of one tool."""

    def __init__(self, model: str, name: str, words: int, has_usage: bool) -> None:
        super().__init__(model, words, has_usage)
        self._call = {
            "index": 0,
            "id": "call_0",
            "type": "function",
            "function": {"name": name, "arguments": "{}"},
        }

    def token(self, number: int) -> bytes:
        """Return the event of a token."""
        delta = msgspec.json.encode({"tool_calls": [self._call]}).decode()
        return _event(self.kind, self.model, f'{{"index":0,"delta":{delta},"finish_reason":null}}')

    def last(self, tokens: int, reason: str) -> bytes:
        """Return what follows the last token."""
        return super().last(tokens, "tool_calls")

    def whole(self, tokens: int, reason: str) -> bytes:
        """Return the answer that is not streamed."""
        call = {name: value for name, value in self._call.items() if name != "index"}
        message = {"role": "assistant", "content": None, "tool_calls": [call]}
        choice = {"index": 0, "message": message, "finish_reason": "tool_calls", "logprobs": None}
        return _whole("chat.completion", self.model, choice, self.words, tokens)


class Embeddings(Chat):
    """Vectors that can be told apart."""

    def __init__(self, body: dict[str, Any], dimensions: int, words: int) -> None:
        super().__init__(str(body["model"]), words, False)
        inputs = body.get("input", "")
        self._count = len(inputs) if isinstance(inputs, list) else 1
        self._dimensions = dimensions

    def whole(self, tokens: int, reason: str) -> bytes:
        """Return the answer that is not streamed."""
        data = [
            {"object": "embedding", "index": index, "embedding": [index + 0.5] * self._dimensions}
            for index in range(self._count)
        ]
        usage = {"prompt_tokens": self.words, "total_tokens": self.words}
        return msgspec.json.encode({"object": "list", "model": self.model, "data": data, "usage": usage})


def words_of(body: dict[str, Any]) -> int:
    """Return how many words a prompt has; they count as its tokens."""
    texts = [str(message.get("content") or "") for message in body.get("messages") or ()]
    for name in ("prompt", "input"):
        given = body.get(name)
        texts += [str(one) for one in given] if isinstance(given, list) else [str(given or "")]
    return sum(len(text.split()) for text in texts)


def _event(kind: str, model: str, choice: str) -> bytes:
    name = msgspec.json.encode(model).decode()
    text = f'{{"id":"scripted","object":"{kind}","created":{CREATED},"model":{name},"choices":[{choice}]}}'
    return b"data: %b\n\n" % text.encode()


@functools.lru_cache(maxsize=65_536)
def _chat_token(model: str, number: int) -> bytes:
    choice = f'{{"index":0,"delta":{{"content":"{number} "}},"finish_reason":null}}'
    return _event(Chat.kind, model, choice)


@functools.lru_cache(maxsize=65_536)
def _completion_token(model: str, number: int) -> bytes:
    return _event(Completion.kind, model, f'{{"index":0,"text":"{number} ","finish_reason":null}}')


def _usage(words: int, tokens: int) -> dict[str, int]:
    return {"prompt_tokens": words, "completion_tokens": tokens, "total_tokens": words + tokens}


def _whole(kind: str, model: str, choice: dict[str, Any], words: int, tokens: int) -> bytes:
    return msgspec.json.encode(
        {
            "id": "scripted",
            "object": kind,
            "created": CREATED,
            "model": model,
            "choices": [choice],
            "usage": _usage(words, tokens),
        }
    )
