"""What a scripted back end plays, and what it takes down."""

from typing import Literal

import msgspec

Flavour = Literal["openai", "ollama", "llama.cpp", "vllm", "lm-studio"]


class ScriptedModel(msgspec.Struct, frozen=True, kw_only=True):
    """A model as the back end lists it, as far as its flavour tells."""

    name: str = "scripted"
    family: str = "script"
    size_bytes: int = 1_000_000
    quantisation: str = "Q8_0"
    context_tokens: int = 4096
    loaded: bool = True
    tools: bool = True
    embeds: bool = False


class Script(msgspec.Struct, frozen=True, kw_only=True):
    """How calls are answered. The k-th token of every answer is the text `k` and a space, counted from 0.

    Attributes:
        flavour: whose listings it imitates. `llama.cpp` answers any model name, and drops `tools` where the model
            has none; the others answer 404 and call the first tool.
        models: what it lists.
        tokens: of each answer; `max_tokens` of a call makes them fewer.
        first_token_ms: from the request to the first token.
        pace_ms: from each token to the next, on a schedule that does not drift.
        context_tokens: words of the prompt plus `max_tokens` beyond this are refused; 0: no limit.
        dimensions: of an embedding.
        api_key: must be shown where it is not empty.
        error_status: calls are answered with it, where it is not 0, ...
        error_calls: ... as many of them as this says; -1: all.
        retry_after_s: is sent along with an error, where it is not 0.
        hang_after: no token from this one on, and the connection stays open.
        drop_after: the connection is cut instead of this token.
        stop_after: the answer ends properly, but before this token and without `[DONE]`.
        error_after: a stream carries an error event instead of this token, and ends.
    """

    flavour: Flavour = "openai"
    models: tuple[ScriptedModel, ...] = (ScriptedModel(),)
    tokens: int = 16
    first_token_ms: float = 0
    pace_ms: float = 0
    context_tokens: int = 0
    dimensions: int = 8
    api_key: str = ""
    error_status: int = 0
    error_calls: int = -1
    retry_after_s: int = 0
    hang_after: int | None = None
    drop_after: int | None = None
    stop_after: int | None = None
    error_after: int | None = None

    def model(self, name: str) -> ScriptedModel | None:
        """Return the model of this name, or None."""
        return next((one for one in self.models if one.name == name), None)


class Request(msgspec.Struct, frozen=True):
    """A request as it came. Names of headers are in lower case."""

    method: str
    path: str
    headers: dict[str, str]
    body: bytes


class Generation(msgspec.Struct, kw_only=True):
    """One answer to a model call.

    `outcome` is empty while it goes on; then `completed`, `cancelled` (its client left), `dropped` or `failed`.
    Times are of the loop's clock, in seconds.
    """

    path: str
    model: str
    started_s: float
    stream: bool
    tokens: int = 0
    outcome: str = ""
    ended_s: float = 0.0


class Counts(msgspec.Struct):
    """What has happened since the start. `paused`: how often a reader was slower than the script."""

    requests: int = 0
    active: int = 0
    active_max: int = 0
    tokens: int = 0
    completed: int = 0
    cancelled: int = 0
    dropped: int = 0
    failed: int = 0
    connections: int = 0
    paused: int = 0


def text_of(tokens: int) -> str:
    """Return the text of a whole answer of so many tokens."""
    return "".join(f"{number} " for number in range(tokens))
