"""Keys of authors: trusted and distrusted, and told to who asks."""

import logging
from collections.abc import Callable, Iterable

from hive_common.contracts.events import Event
from hive_common.kernel.errors import Conflict, FailedPrecondition, NotFound, VersionConflict
from hive_common.kernel.ids import derive_id

from hive_registry.domain import signers
from hive_registry.domain.signers import TRUSTED_MAX, UNKNOWN, SignerState
from hive_registry.log_access import TRIES_MAX, LogAccess
from hive_registry.settings import AuthorKey
from hive_registry.views import SignerRow, Views

log = logging.getLogger(__name__)


class SignerDesk:
    """What the registry does with one key at a time: decide on its state, write, answer from the view.

    Args:
        views: reads.
        log: writes.
    """

    def __init__(self, views: Views, log: LogAccess) -> None:
        self._views = views
        self._log = log

    async def trust(self, public_key: str, name: str, actor: str) -> SignerRow:
        """Let what the key signs be published and run.

        Raises:
            InvalidArgument: not a key, or not a name.
            Conflict: another key that is trusted has this name.
            FailedPrecondition: too many keys are trusted.
        """
        signers.trust(UNKNOWN, public_key, name)
        others = [row for row in await self._views.signers() if row.trusted and row.public_key != public_key]
        if any(row.name == name for row in others):
            raise Conflict(f"name: another trusted key is called {name}; expected a name of its own", path="name")
        if len(others) >= TRUSTED_MAX:
            raise FailedPrecondition(
                f"{TRUSTED_MAX} keys are trusted, expected fewer; take one back with: hive agent key distrust NAME"
            )
        return await self._change(public_key, actor, lambda state: signers.trust(state, public_key, name))

    async def distrust(self, key: str, reason: str, actor: str) -> SignerRow:
        """Let nothing that the key signed be published or run any more.

        Args:
            key: in hex, or the name under which it is trusted.
            reason: for people.
            actor: whose decision it is.

        Raises:
            InvalidArgument: such a reason.
            NotFound: no key of that name is trusted.
        """
        public_key = await self._named(key)
        return await self._change(public_key, actor, lambda state: signers.distrust(state, reason))

    async def trust_own(self, authors: Iterable[AuthorKey]) -> None:
        """Trust the installation's own keys, of which nothing was said before. Raises what `trust` raises."""
        for author in authors:
            if (await self.state(author.public_key)).version == 0:
                await self.trust(author.public_key, author.name, "registry")
                log.info("the installation's own author key %s is trusted", author.name)

    async def state(self, public_key: str) -> SignerState:
        """Return what is known of a key."""
        row = await self._views.signer(public_key)
        return UNKNOWN if row is None else row.state

    async def rows(self) -> list[SignerRow]:
        """Return every key that was ever trusted, those that are trusted first."""
        return await self._views.signers()

    async def trusted(self) -> tuple[tuple[str, ...], int]:
        """Return the keys whose agents may run, and the position of the last event about any key."""
        rows = await self._views.signers()
        keys = tuple(sorted(row.public_key for row in rows if row.trusted))
        return keys, max((row.position for row in rows), default=0)

    def stream_of(self, public_key: str) -> str:
        """Return the stream of a key."""
        return derive_id("signer", self._log.ns, public_key)

    async def _named(self, key: str) -> str:
        rows = await self._views.signers()
        for row in rows:
            if row.public_key == key or (row.trusted and row.name == key):
                return row.public_key
        names = ", ".join(sorted(row.name for row in rows if row.trusted)) or "none"
        raise NotFound(f"there is no trusted key {key[:80]!r}; trusted are: {names} (hive agent key list)")

    async def _change(
        self, public_key: str, actor: str, decide: Callable[[SignerState], tuple[Event, ...]]
    ) -> SignerRow:
        for tries_left in reversed(range(TRIES_MAX)):
            row = await self._views.signer(public_key)
            state = UNKNOWN if row is None else row.state
            events = decide(state)
            if not events and row is not None:
                return row
            try:
                await self._log.append(self.stream_of(public_key), state.version, events, actor)
            except VersionConflict:
                if not tries_left:
                    raise
                await self._log.catch_up()
        row = await self._views.signer(public_key)
        if row is None:
            raise NotFound(f"there is no key {public_key}")
        return row
