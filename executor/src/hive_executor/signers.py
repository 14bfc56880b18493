"""Whose agents may run here: the signing keys that the registry trusts, as this device was last told.

The registry tells them at hello; every answer to a pull says how new that has to be. Until a device knows as much
it runs nothing (fail closed); what it knows outlives a restart, so that it can work while the registry is away.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

import msgspec
from hive_common.kernel.errors import Unavailable
from hive_common.ops.files import replace_file

log = logging.getLogger(__name__)

NEWS_WITHIN_S: Final = 20.0
"""How long an attempt waits for the registry. Then it is given back: another device may know more."""


class _Told(msgspec.Struct, frozen=True):
    keys: frozenset[str]
    position: int


NOTHING: Final = _Told(frozenset(), -1)


class Signers:
    """The keys, and what to do when they change.

    Args:
        folder: where they are kept, which exists.
        on_change: called when the registry has told what is new enough.
        ask: has the registry asked anew.
    """

    def __init__(self, folder: Path, on_change: Callable[[], None], ask: Callable[[], None]) -> None:
        self._file = folder / "signers.json"
        self._on_change = on_change
        self._ask = ask
        self._told = NOTHING
        self._wanted = 0
        self._news = asyncio.Event()

    def load(self) -> None:
        """Take what an earlier process was told; nothing, where that cannot be read."""
        try:
            self._told = msgspec.json.decode(self._file.read_bytes(), type=_Told)
        except FileNotFoundError:
            return
        except (OSError, msgspec.DecodeError, UnicodeDecodeError) as error:
            log.warning("%s: %s; waiting for the registry", self._file, error)

    def trusts(self, key: str) -> bool:
        """Say whether a key is trusted, as far as is known now."""
        return key in self._told.keys

    def told(self, keys: Iterable[str], position: int) -> None:
        """Take what the registry says."""
        before, self._told = self._told, _Told(frozenset(keys), position)
        if self._told == before:
            return
        try:
            replace_file(self._file, msgspec.json.encode(self._told), mode=0o600)
        except OSError as error:
            log.warning("%s: %s; it will be asked for again after a restart", self._file, error)
        self._news.set()
        if self._is_current():
            self._on_change()

    def wanted(self, position: int) -> None:
        """Take how new it has to be, and ask for it where it is older."""
        self._wanted = max(self._wanted, position)
        if not self._is_current():
            self._ask()

    def _is_current(self) -> bool:
        return self._told.position >= self._wanted

    async def current(self) -> frozenset[str]:
        """Return the trusted keys, as new as they have to be.

        Raises:
            Unavailable: the registry did not tell them in time.
        """
        if self._is_current():
            return self._told.keys
        try:
            async with asyncio.timeout(NEWS_WITHIN_S):
                while not self._is_current():
                    self._news.clear()
                    await self._news.wait()
        except TimeoutError as error:
            raise Unavailable("the registry does not say whose agents may run here") from error
        return self._told.keys
