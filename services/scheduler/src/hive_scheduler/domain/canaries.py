"""Tasks whose answers are known: what is known of them, the job that gives one to an executor, and who is judged.

A canary is a job of one task that looks to its executor like any other of its agent. Its answer is kept as its key
alone, so that it travels nowhere. It judges by the answer: another one is invalid, and none is lost.
"""

from typing import Final, Literal, NamedTuple

import msgspec
from hive_common.contracts.events import AgentRef, AttemptFailed, AttemptSucceeded, CanaryAdded
from hive_common.contracts.judgement import CanonicalJson, Exact
from hive_common.contracts.limits import KIB
from hive_common.contracts.values import Value
from hive_common.judgement.equality import key_of
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument

OF_AGENT_MAX: Final = 100
"""Canaries of one agent version."""
BYTES_MAX: Final = 16 * KIB
"""Of an input, and of an answer: however it is spelt, the same JSON then fits in a report."""
WAIT_MS: Final = 180_000
"""How long a canary may wait for its executor, besides the timeout of its task."""

Equal = Literal["exact", "json"]
Ending = Literal["valid", "invalid", "lost"]
_RULES: Final[dict[str, Exact | CanonicalJson]] = {"exact": Exact(), "json": CanonicalJson()}
_OUTSIDE: Final = ("model", "http", "kv", "fork")


class Canary(NamedTuple):
    """A task whose answer is known."""

    id: str
    agent: str
    input: bytes
    key: str
    equal: Equal

    @classmethod
    def of(cls, canary: str, event: CanaryAdded) -> "Canary":
        """Return a canary as the log has it."""
        return cls(canary, event.agent, event.input.raw or b"", event.key, event.equal)


class Like(NamedTuple):
    """What a canary has in common with the task that it goes before, as far as an executor may see it."""

    executor: str
    step: str
    timeout_ms: int
    priority: str


def check_agent(reference: str, agent: AgentRef) -> None:
    """Refuse an agent whose answer follows from more than its input, or that changes what lies outside of it.

    Raises:
        FailedPrecondition: it asks for models, for addresses, for kept values, or to fork.
    """
    asked = [name for name in _OUTSIDE if getattr(agent, name) is not None]
    if asked:
        raise FailedPrecondition(
            f"{reference} asks for {', '.join(asked)}: its answer is not known by its input alone, and each canary "
            "would cost or change something; expected an agent that only computes",
            agent=reference,
        )


def json_of(name: str, given: bytes) -> bytes:
    """Return a JSON text without blanks around it. Raises `InvalidArgument`."""
    if len(given) > BYTES_MAX:
        raise InvalidArgument(f"{name}: has {len(given)} bytes, expected {BYTES_MAX} at most", path=name)
    try:
        return bytes(msgspec.json.decode(given, type=msgspec.Raw))
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidArgument(f"{name}: is not JSON: {error}", path=name) from error


def answer_key(equal: str, answer: bytes) -> str:
    """Return the key of an answer. Raises `InvalidArgument`."""
    if equal not in _RULES:
        raise InvalidArgument(f"equal: got {equal[:80]!r}; expected exact or json", path="equal")
    return key_of(_RULES[equal], answer)


def ending_of(canary: Canary, event: AttemptSucceeded | AttemptFailed) -> Ending:
    """Return what the end of a canary's attempt says of who had it."""
    if isinstance(event, AttemptSucceeded):
        return "valid" if _is_right(canary, event.output) else "invalid"
    return "lost"


def _is_right(canary: Canary, output: Value) -> bool:
    if output.raw is not None:
        return key_of(_RULES[canary.equal], output.raw) == canary.key
    # No other JSON that is equal to an answer of `BYTES_MAX` is as large as what is named by its digest.
    return canary.equal == "exact" and output.digest == canary.key


def document(canary: Canary, like: Like) -> bytes:
    """Return the job that gives a canary to an executor."""
    return msgspec.json.encode(
        {
            "apiVersion": "hive/v1",
            "kind": "Job",
            "name": "canary",
            "priority": like.priority,
            "limits": {"deadline": f"{like.timeout_ms + WAIT_MS}ms"},
            "tasks": [
                {
                    "id": like.step,
                    "agent": canary.agent,
                    "input": "${input}",
                    "timeout": f"{like.timeout_ms}ms",
                    "place": {"executors": [like.executor]},
                }
            ],
        }
    )
