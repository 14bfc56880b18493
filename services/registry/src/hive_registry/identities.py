"""NATS identities of executors: signs their credentials, and tells the server whom it refuses."""

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Final, NamedTuple

from hive_common.bus.claims import push_account
from hive_common.bus.jwt import account_jwt, executor_jwt, public_nkey
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import HiveError
from hive_common.ops.config import read_secret
from nats.aio.client import Client

from hive_registry.settings import IdentitySettings

log = logging.getLogger(__name__)

_US: Final = 1_000_000
RETRY_S: Final = 1.0
PUSHED_WITHIN_S: Final = 5.0
"""How long a revocation waits for the server. It is committed then, and the server is told again and again."""


class Signed(NamedTuple):
    """A user JWT of an executor and when it ends."""

    jwt: str
    expires_us: int


class Signer:
    """Signs for executors, and the account.

    Args:
        settings: which keys.
        clock: gives the JWTs their time.

    Raises:
        InvalidArgument: a file with a seed cannot be used.
    """

    def __init__(self, settings: IdentitySettings, clock: Clock) -> None:
        self._settings = settings
        self._clock = clock
        self._operator_seed = read_secret(settings.operator_seed_file)
        self._signer_seed = read_secret(settings.executor_signer_seed_file)
        self._signer = public_nkey(self._signer_seed)

    def executor(self, executor: str, user: str) -> Signed:
        """Return credentials of an executor with the public nkey `user`."""
        issued_s = self._clock.now_us() // _US
        valid_s = self._settings.valid_s
        jwt = executor_jwt(self._signer_seed, self._settings.account, executor, user, issued_s, valid_s)
        return Signed(jwt, (issued_s + valid_s) * _US)

    def account(self, revoked: Sequence[str]) -> str:
        """Return the account's claims, with the public nkeys that are refused for ever."""
        now_s = self._clock.now_us() // _US
        return account_jwt(self._operator_seed, self._settings.account, self._signer, now_s, revoked)


class Revocations:
    """Keeps the server's account as the views have it. The log is the truth; the server may have lost anything.

    Args:
        signer: of the account.
        revoked: reads who is revoked.
    """

    def __init__(self, signer: Signer, revoked: Callable[[], Awaitable[list[str]]]) -> None:
        self._signer = signer
        self._revoked = revoked
        self._asked = 0
        self._told = 0
        self._wake = asyncio.Event()
        self._changed = asyncio.Condition()

    def again(self) -> int:
        """Have the server told once more, and return the number of this telling, for `wait_for`."""
        self._asked += 1
        self._wake.set()
        return self._asked

    async def reconnected(self) -> None:
        """Have the server told once more: it may be another one, or have lost what it knew."""
        self.again()

    async def wait_for(self, telling: int) -> bool:
        """Return whether the server was told in time."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PUSHED_WITHIN_S), self._changed:
                await self._changed.wait_for(lambda: self._told >= telling)
        return self._told >= telling

    async def run(self, system: Client) -> None:
        """Tell the server at the start and whenever asked, until cancelled; what fails is tried again."""
        self.again()
        while True:
            await self._wake.wait()
            self._wake.clear()
            telling = self._asked
            try:
                revoked = await self._revoked()
                await push_account(system, self._signer.account(revoked))
            except HiveError as error:
                log.warning("revocations: %s; trying again", error.message)
                await asyncio.sleep(RETRY_S)
                self._wake.set()
                continue
            log.info("the server knows the account, with %d revoked keys", len(revoked))
            async with self._changed:
                self._told = max(self._told, telling)
                self._changed.notify_all()
