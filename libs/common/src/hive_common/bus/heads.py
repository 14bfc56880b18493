"""`hive.log.head`: writers say that the log has grown, readers wake up. A hint; nothing depends on it."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

import msgspec
from nats.aio.client import Client
from nats.aio.msg import Msg

from hive_common.contracts.messages import HEAD_SUBJECT, HeadHint

log = logging.getLogger(__name__)


def head_announcer(client: Client, *wakes: asyncio.Event) -> Callable[[int], Awaitable[None]]:
    """Return the `on_head` of a `LogWriter`: tells other processes, and sets `wakes` in this one."""

    async def announce(position: int) -> None:
        for wake in wakes:
            wake.set()
        # While NATS is away hints would only pile up; readers poll besides.
        if client.is_connected:
            await client.publish(HEAD_SUBJECT, msgspec.json.encode(HeadHint(position=position)))

    return announce


async def wake_on_head(client: Client, *wakes: asyncio.Event) -> None:
    """Set `wakes` whenever some writer says that the log has grown."""

    async def receive(_: Msg) -> None:
        for wake in wakes:
            wake.set()

    await client.subscribe(HEAD_SUBJECT, cb=receive)
