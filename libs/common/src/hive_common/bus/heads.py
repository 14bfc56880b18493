"""`hive.log.head`: writers say that the log has grown, readers wake up. A hint; nothing depends on it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from hive_common.contracts.events import TYPES
from hive_common.contracts.messages import HEAD_SUBJECT, HeadHint

log = logging.getLogger(__name__)

_decode = msgspec.json.Decoder(HeadHint).decode


def concerns(hint: bytes, types: Collection[str] | None) -> bool:
    """Whether a hint may be about an event of `types` (None: of any type), or of one that this code does not know.

    An unknown type has to come to every reader, so that it stops (law 11). A hint that cannot be read concerns
    everybody.
    """
    if types is None:
        return True
    try:
        new = _decode(hint).types
    except msgspec.DecodeError:
        return True
    return new is None or any(name in types or name not in TYPES for name in new)


def head_announcer(
    client: Client, *wakes: asyncio.Event, pause_s: float = 0.0
) -> Callable[[int, tuple[str, ...]], Awaitable[None]]:
    """Return the `on_head` of a `LogWriter`: tells other processes, and sets `wakes` in this one.

    Args:
        client: connection to NATS.
        wakes: events to set.
        pause_s: between two hints, so that under load one of them speaks for many commits.
    """

    async def announce(position: int, types: tuple[str, ...]) -> None:
        for wake in wakes:
            wake.set()
        # While NATS is away hints would only pile up; readers poll besides.
        if client.is_connected:
            hint = HeadHint(position=position, types=types)
            await client.publish(HEAD_SUBJECT, msgspec.json.encode(hint))
        await asyncio.sleep(pause_s)

    return announce


async def wake_on_head(client: Client, *wakes: asyncio.Event, types: Collection[str] | None = None) -> None:
    """Set `wakes` whenever some writer says that the log has grown.

    Args:
        client: connection to NATS.
        wakes: events to set.
        types: only by events of these types, and of such as this code does not know.
    """

    async def receive(message: Msg) -> None:
        if concerns(message.data, types):
            for wake in wakes:
                wake.set()

    await client.subscribe(HEAD_SUBJECT, cb=receive)
