"""Writing events of a stream and waiting until the registry's own views contain them."""

import asyncio
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple

from hive_common.contracts.events import SCHEMA, Event, encode
from hive_common.eventlog.log import Append, LogReader, LogWriter, NewEvent
from hive_common.eventlog.projection import ProjectionRunner
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import DeadlineExceeded

VIEW_WITHIN_S: Final = 10.0
"""How long a caller waits for the view after its event was committed."""

TRIES_MAX: Final = 5
"""How often a decision is made anew when somebody else wrote to the same stream meanwhile."""


class Entry(NamedTuple):
    """Events for one stream, which stands at `version`. An empty `owner` is the installation's."""

    stream: str
    version: int
    events: tuple[Event, ...]
    owner: str = ""


class LogAccess:
    """The log as the registry's use cases see it.

    Args:
        writer: appends.
        reader: tells the head.
        runner: of the registry's projection.
        wake: makes `runner` look at the log now. Hints of the log's head set it for the registry's own types only.
        clock: gives the events their time.
        owner: pseudonym of the installation's owner.
        ns: the namespace.
    """

    def __init__(
        self,
        writer: LogWriter,
        reader: LogReader,
        runner: ProjectionRunner,
        wake: asyncio.Event,
        clock: Clock,
        owner: str,
        ns: str,
    ) -> None:
        self._writer = writer
        self._reader = reader
        self._runner = runner
        self._wake = wake
        self._clock = clock
        self._owner = owner
        self.ns = ns

    @property
    def position(self) -> int:
        """The views contain all up to here."""
        return self._runner.position

    async def append(self, stream: str, version: int, events: Sequence[Event], actor: str, owner: str = "") -> int:
        """Append to a stream that stands at `version`, and return the position once the views contain it.

        Args:
            stream: of the events.
            version: it stands there.
            events: in their order.
            actor: who they are by.
            owner: pseudonym of whose they are; empty for the installation's owner.

        Raises:
            VersionConflict: the stream stands elsewhere.
            Unavailable: the log cannot be reached.
            DeadlineExceeded: it is committed, but the views are behind.
        """
        return await self.append_all((Entry(stream, version, tuple(events), owner),), actor)

    async def append_all(
        self, entries: Sequence[Entry], actor: str, expect: Mapping[str, int] | None = None
    ) -> int:
        """Append to several streams, to all of them or to none. Returns and raises as `append`.

        Args:
            expect: further streams, only read, that have to stand at this version.
        """
        position = await self.commit(entries, actor, expect)
        await self._seen(position)
        return position

    async def commit(self, entries: Sequence[Entry], actor: str, expect: Mapping[str, int] | None = None) -> int:
        """Append as `append_all` does, without waiting for the views, for what they do not show."""
        now_us = self._clock.now_us()
        appended = tuple(
            NewEvent(
                stream=entry.stream,
                version=entry.version + offset,
                type=type(event).__name__,
                schema=SCHEMA,
                payload=encode(event),
                ts_us=now_us,
                actor=actor,
                owner=entry.owner or self._owner,
                ns=self.ns,
            )
            for entry in entries
            for offset, event in enumerate(entry.events, start=1)
        )
        return await self._writer.append(Append(appended, dict(expect or {})))

    async def catch_up(self) -> None:
        """Return when the views contain everything that is committed now. Raises what `append` raises."""
        await self._seen(await self._reader.head())

    async def _seen(self, position: int) -> None:
        if self._runner.position < position:
            self._wake.set()
        try:
            async with asyncio.timeout(VIEW_WITHIN_S):
                await self._runner.wait_for(position)
        except TimeoutError as error:
            raise DeadlineExceeded(
                f"position {position} is committed, but the registry's view is still at {self._runner.position}"
            ) from error
