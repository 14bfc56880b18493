"""Who called, as a pseudonym for the log."""

import re
from typing import Any, Final

import grpc.aio
from hive_common.kernel.errors import InvalidArgument

CALLER_METADATA: Final = "hive-caller"
_PSEUDONYM: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}\Z")


def actor_of(context: grpc.aio.ServicerContext[Any, Any], named: str, fallback: str) -> str:
    """Return who an event is by.

    Args:
        context: of the call; the gateway states the caller in its metadata, and that counts.
        named: the caller that a request names; believed only where the metadata says nothing.
        fallback: where neither does.

    Raises:
        InvalidArgument: not a pseudonym. No free text may stand in an envelope.
    """
    metadata = dict(context.invocation_metadata() or ())
    actor = str(metadata.get(CALLER_METADATA, "")) or named or fallback
    if not _PSEUDONYM.match(actor):
        raise InvalidArgument("caller: expected letters, digits and . _ : @ - only, at most 128", path="caller")
    return actor
