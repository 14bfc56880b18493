"""What REST answers about canaries."""

import msgspec
from hive_proto.canaries.v1 import canaries_pb2

from hive_gateway.views import View


class Canary(View, frozen=True, kw_only=True):
    """A task whose answer is known. `key` is the answer's, as the log has it; `removed`: nobody is given it."""

    canary_id: str
    agent: str
    input: msgspec.Raw
    equal: str
    key: str
    removed: bool = False


class CanaryPage(View, frozen=True, kw_only=True):
    """Canaries, by agent."""

    canaries: tuple[Canary, ...]


def canary(message: canaries_pb2.Canary) -> Canary:
    """Return the view of a canary."""
    return Canary(
        canary_id=message.canary_id,
        agent=message.agent,
        input=msgspec.Raw(message.input_json),
        equal=message.equal,
        key=message.key,
        removed=message.removed,
    )
