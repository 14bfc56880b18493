"""Tells the registry what this device is, at the start and whenever it changes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from hive_common.contracts.events import Capabilities, Power
from hive_common.contracts.messages import HelloReply, HelloRequest, KillOrder, hello_subject
from hive_common.kernel.errors import HiveError, PermissionDenied

from hive_executor.capabilities import is_news
from hive_executor.link import Backoff, Link

log = logging.getLogger(__name__)

ANSWER_S: Final = 5.0


class Greeter:
    """Says hello until it is answered, and again when something has changed.

    Args:
        look: returns the capabilities as they are now.
        interval_ms: how often it looks.
        on_refused: called when the registry does not take this executor.
        on_order: called with the kill order that the registry has.
        on_signers: called with the keys whose agents may run, and the log's position of that.
    """

    def __init__(
        self,
        link: Link,
        *,
        name: str,
        session: str,
        look: Callable[[], Awaitable[Capabilities]],
        interval_ms: int,
        on_refused: Callable[[], None] = lambda: None,
        on_order: Callable[[KillOrder | None], None] = lambda _: None,
        on_signers: Callable[[tuple[str, ...], int], None] = lambda keys, position: None,
    ) -> None:
        self._link = link
        self._name = name
        self._session = session
        self._look = look
        self._interval_ms = interval_ms
        self._on_refused = on_refused
        self._on_order = on_order
        self._on_signers = on_signers
        self._told: Capabilities | None = None
        self._wake = asyncio.Event()
        self.power = Power()
        self.blobs_url = ""
        """The gateway's base URL as the registry knows it."""
        self.greeted = asyncio.Event()
        """Set once the first hello was answered."""

    def again(self) -> None:
        """Say hello anew: the control plane does not know this executor."""
        self._told = None
        self._wake.set()

    def look_again(self) -> None:
        """Look now: something may have changed."""
        self._wake.set()

    async def run(self) -> None:
        """Greet for ever. Ends only by being cancelled."""
        backoff = Backoff()
        while True:
            self._wake.clear()
            now = await self._look()
            self.power = now.power
            if is_news(self._told, now):
                try:
                    await self._greet(now)
                    backoff.reset()
                except HiveError as error:
                    log.info("hello: %s", error.message)
                    if isinstance(error, PermissionDenied):
                        self._on_refused()
                    await asyncio.sleep(backoff.next_s())
                    continue
            try:
                async with asyncio.timeout(self._interval_ms / 1000):
                    await self._wake.wait()
            except TimeoutError:
                pass

    async def _greet(self, capabilities: Capabilities) -> None:
        body = HelloRequest(name=self._name, session=self._session, capabilities=capabilities)
        reply = await self._link.request(hello_subject(self._link.executor_id), body, HelloReply, ANSWER_S)
        if reply.error is not None:
            raise reply.error.raised()
        self._on_order(reply.kill)
        self._on_signers(reply.signers, reply.signers_position)
        self._told = capabilities
        self.blobs_url = reply.blobs_url or self.blobs_url
        self.greeted.set()
        log.info("the registry knows this executor, as of position %d", reply.position)
