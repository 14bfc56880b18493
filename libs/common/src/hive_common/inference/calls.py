"""One model call, as it travels between surface, router and back end. Bodies are bytes in OpenAI's shape."""

from collections.abc import AsyncGenerator, Sequence
from typing import Final, Literal, Protocol

import msgspec

from hive_common.contracts.budgets import SharedBudget
from hive_common.contracts.events import Model
from hive_common.kernel.errors import InvalidArgument, PermissionDenied

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
PINS: Final = "own-devices, pool, region:<name> or any"

CONTEXT_LENGTH_EXCEEDED: Final = "context_length_exceeded"
"""`reason` in the fields of an `InvalidArgument`: what was asked does not fit into the model's context."""

BODY_BYTES_MAX: Final = 8 * 1024 * 1024


class OfferedModel(Model, frozen=True, omit_defaults=True):
    """A model as it can be called, with the ids of the devices and the names of the providers that serve it."""

    executors: tuple[str, ...] = ()
    providers: tuple[str, ...] = ()


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
        agent: `name@version` of that guest, where its token says so.
        tokens_max: what this call may generate, 0 without such a limit.
        attempt_tokens_max: what all calls of its attempt may generate together, 0 without such a limit.
        token: capability token of the attempt whose guest calls; it stays between executor and router.
        cloud: the key may use providers outside, within a budget.
        budgets: what it shares with other calls of its job and of its task.
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
    agent: str = ""
    tokens_max: int = 0
    attempt_tokens_max: int = 0
    token: str = ""
    cloud: bool = False
    budgets: tuple[SharedBudget, ...] = ()

    @property
    def metered(self) -> bool:
        """Whether its tokens count against a budget, so that the router has to be asked before it is made."""
        return any(one.tokens is not None for one in self.budgets)


def is_pin(text: str) -> bool:
    """Say whether `text` tells where data may go."""
    region = text.startswith(PIN_REGION) and len(text) > len(PIN_REGION)
    return region or text in (PIN_ANY, PIN_POOL, PIN_OWN_DEVICES)


def narrowest(first: str, second: str) -> str:
    """Return the pin that holds where both do; an empty one is `any`.

    Raises:
        PermissionDenied: neither is narrower than the other.
    """
    first, second = first or PIN_ANY, second or PIN_ANY
    if first == second or _narrows(first, second):
        return first
    if _narrows(second, first):
        return second
    raise PermissionDenied(f"`{first}` and `{second}` cannot hold together", pin=first)


def _narrows(pin: str, other: str) -> bool:
    return other == PIN_ANY or (other == PIN_POOL and pin != PIN_ANY)


def narrowed(pin: str, wanted: str) -> str:
    """Return the pin that holds for a call that asks for `wanted` under a key's `pin`.

    Args:
        pin: of the key, the job or the agent.
        wanted: of the call; empty takes `pin`.

    Raises:
        InvalidArgument: `wanted` is no pin.
        PermissionDenied: it would let data go where `pin` does not.
    """
    if wanted in ("", pin):
        return pin
    if not is_pin(wanted):
        raise InvalidArgument(f"{wanted[:80]!r} is no pin; expected {PINS}", path="pin")
    if _narrows(wanted, pin):
        return wanted
    raise PermissionDenied(f"calls here are pinned to `{pin}`; `{wanted}` would not narrow that", pin=pin)


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
            else pieces of the JSON body. Closing the iterator cancels the generation at the back end. An async
            generator that was never begun runs no `finally`: whoever wants to let go of it begins it first, and
            surfaces await its first chunk without awaiting anything else before.
    """

    head: Head
    chunks: AsyncGenerator[bytes, None]


class Completer(Protocol):
    """Whatever can serve model calls: a back end, the router, or a way to it."""

    async def complete(self, call: ModelCall) -> Answer:
        """Begin a call; return when its first byte is there.

        Raises:
            NotFound: nothing serves the model; `fields` has `nearest`.
            InvalidArgument: the back end refuses the body (context overflow, unknown parameter). `fields` may have
                `reason` (`CONTEXT_LENGTH_EXCEEDED` for an overflow) and `path`, the parameter.
            RateLimited: the queue of the model is full; `fields` may have `retry_after_s`.
            Unavailable: whatever could serve it cannot be reached, or the pin forbids it; says the reason.
            DeadlineExceeded: the time that was given ran out.
            PermissionDenied: the caller may not.
        """
        ...

    async def models(self) -> Sequence[Model]:
        """Return what can be called at present, each model once, in order of name; `OfferedModel` says where.

        Raises:
            Unavailable: it cannot be told now.
        """
        ...
