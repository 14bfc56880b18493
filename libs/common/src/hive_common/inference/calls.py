"""One model call, as it travels between surface, router and back end. Bodies are bytes in OpenAI's shape."""

from collections.abc import AsyncGenerator
from typing import Final, Literal, Protocol

import msgspec

from hive_common.contracts.events import Model

Endpoint = Literal["chat", "completions", "embeddings"]

PATHS: Final[dict[Endpoint, str]] = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "embeddings": "/v1/embeddings",
}
"""Where OpenAI's API, and every back end that speaks it, takes the calls of an endpoint."""

PIN_ANY: Final = "any"
PIN_POOL: Final = "pool"
PIN_OWN_DEVICES: Final = "own-devices"
PIN_REGION: Final = "region:"
"""What follows is the value of the device's label `region`."""

BODY_BYTES_MAX: Final = 8 * 1024 * 1024


class ModelCall(msgspec.Struct, frozen=True, kw_only=True):
    """A call of an OpenAI endpoint.

    Attributes:
        id: UUIDv7, made by the surface that took the call; its answer carries it as `x-request-id`.
        endpoint: which one.
        model: as in the body.
        body: the JSON object as it came; what is unknown in it passes through unharmed.
        stream: as in the body.
        deadline_ms: what is left for the whole call; passed down.
        caller: pseudonym of whoever calls.
        key: name of the key that was shown; empty for calls of a device.
        pin: where data may go.
        counts_only: keep no prompt and no completion.
        origin: id of the device that the call comes from; empty for the gateway's host.
        job, task, attempt: of the guest that calls; empty and 0 for a program.
        tokens_max: what this call may generate, 0 without such a limit.
    """

    id: str
    endpoint: Endpoint
    model: str
    body: bytes
    stream: bool
    deadline_ms: int
    caller: str = ""
    key: str = ""
    pin: str = PIN_ANY
    counts_only: bool = False
    origin: str = ""
    job: str = ""
    task: str = ""
    attempt: int = 0
    tokens_max: int = 0


class Head(msgspec.Struct, frozen=True):
    """What is known when the answer begins. `status` is the back end's, below 400."""

    status: int
    content_type: str
    route: str = ""
    executor: str = ""


class Answer(Protocol):
    """The answer to a call that has begun. Whoever has it MUST exhaust `chunks` or `aclose` it.

    Attributes:
        head: status, kind of content, route.
        chunks: of a stream, whole server-sent events, the last of which is `data: [DONE]` or carries an `error`;
            else pieces of the JSON body. Closing the iterator cancels the generation at the back end.
    """

    head: Head
    chunks: AsyncGenerator[bytes, None]


class Completer(Protocol):
    """Whatever can serve model calls: a back end, the router, or a way to it."""

    async def complete(self, call: ModelCall) -> Answer:
        """Begin a call; return when its first byte is there.

        Raises:
            NotFound: nothing serves the model; `fields` has `nearest`.
            InvalidArgument: the back end refuses the body (context overflow, unknown parameter).
            RateLimited: the queue of the model is full; `fields` may have `retry_after_s`.
            Unavailable: whatever could serve it cannot be reached, or the pin forbids it; says the reason.
            DeadlineExceeded: the time that was given ran out.
            PermissionDenied: the caller may not.
        """
        ...

    async def models(self) -> list[Model]:
        """Return what can be called at present, each model once, in order of name.

        Raises:
            Unavailable: it cannot be told now.
        """
        ...
