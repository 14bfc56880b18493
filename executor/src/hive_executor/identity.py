"""Who this executor is: its key, the credentials for NATS, and what it shows at the gateway."""

import asyncio
import contextlib
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import aiohttp
import msgspec
from hive_common.bus import assertion
from hive_common.bus.jwt import Credentials, claims_of, credentials_text, public_nkey, read_credentials
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import ErrorBody, HiveError, InvalidArgument, PermissionDenied, Unavailable
from hive_common.ops.files import replace_file

from hive_executor.gateway import Gateway
from hive_executor.link import Backoff

log = logging.getLogger(__name__)

REVOKED: Final = "revoked"
RENEW_AT: Final = (0.45, 0.55)
"""Parts of its validity after which credentials are renewed: spread, so that not all executors come at once."""

LOOK_S: Final = 1.0
"""How often the clock and the connection are looked at."""

CUT_OFF_S: Final = 2.0
"""Without a connection for so long, credentials are asked for: the ones here may be what NATS does not take."""

ANSWER_BYTES_MAX: Final = 64 * 1024
_TIMEOUT: Final = aiohttp.ClientTimeout(total=15, connect=5)
_US: Final = 1_000_000


class _Answer(msgspec.Struct):
    nats_jwt: str


class _Claims(msgspec.Struct):
    iat: int
    exp: int | None = None


class Identity:
    """The key and the credentials, in the file from which the connection to NATS takes them at every connect.

    Args:
        executor_id: of this executor.
        credentials_file: user JWT and seed, mode 0600.
        clock: gives assertions their time.

    Attributes:
        public_key: the nkey that others know this executor by.

    Raises:
        InvalidArgument: the file cannot be used.
    """

    def __init__(self, executor_id: str, credentials_file: str, clock: Clock) -> None:
        self.executor_id = executor_id
        self._file = Path(credentials_file)
        self._clock = clock
        known = read_credentials(self._file)
        self._key = assertion.private_key(known.seed)
        self.public_key = public_nkey(known.seed)
        self._claims = _claims(known.jwt)
        self._shown = ("", 0.0)

    def header(self) -> dict[str, str]:
        """Return the header that shows at the gateway who this is. It is good for a minute at most."""
        now_s = self._now_s()
        token, made_s = self._shown
        # One and the same for a while, so that the gateway has to verify it once only.
        if not 0 <= now_s - made_s < assertion.VALID_S / 2:
            token = assertion.make(self._key, self.executor_id, now_s)
            self._shown = (token, now_s)
        return {"Authorization": f"Bearer {token}"}

    @property
    def left_s(self) -> float:
        """How long the credentials are good; negative once they are not."""
        return float("inf") if self._claims.exp is None else self._claims.exp - self._now_s()

    def renew_s(self, part: float) -> float:
        """Return how long until `part` of the validity is over."""
        if self._claims.exp is None:
            return float("inf")
        return self._claims.iat + part * (self._claims.exp - self._claims.iat) - self._now_s()

    def keep(self, jwt: str) -> None:
        """Write new credentials, whole or not at all.

        Raises:
            InvalidArgument: it is no JWT.
            OSError: the file cannot be written.
        """
        claims = _claims(jwt)
        seed = read_credentials(self._file).seed
        replace_file(self._file, credentials_text(Credentials(jwt, seed)).encode(), mode=0o600)
        self._claims = claims

    def _now_s(self) -> float:
        return self._clock.now_us() / _US


def _claims(jwt: str) -> _Claims:
    try:
        return msgspec.convert(claims_of(jwt), type=_Claims)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"the credentials of this executor: {error}") from error


class Renewal:
    """Gets new credentials in time, and learns that there will be none.

    Args:
        identity: what is renewed.
        gateway: gives new ones.
        is_connected: says whether NATS takes what there is.
        on_revoked: called once the gateway says that this executor is out.
    """

    def __init__(
        self,
        identity: Identity,
        gateway: Gateway,
        is_connected: Callable[[], bool],
        on_revoked: Callable[[], None],
    ) -> None:
        self._identity = identity
        self._gateway = gateway
        self._is_connected = is_connected
        self._on_revoked = on_revoked
        self._backoff = Backoff(1.0, 60.0)
        self._soon = asyncio.Event()
        self.problem: str | None = None
        """What keeps it from renewing, in words."""

    def soon(self) -> None:
        """Ask now: there is a hint that this executor is out."""
        self._soon.set()

    async def run(self) -> None:
        """Renew for ever. Returns only once this executor is revoked."""
        while True:
            await self._until_due(random.uniform(*RENEW_AT))  # noqa: S311
            try:
                self._identity.keep(await self._ask())
            except PermissionDenied as error:
                if error.fields.get("reason") == REVOKED:
                    self._on_revoked()
                    return
                self._failed(error)
            except (HiveError, aiohttp.ClientError, OSError, TimeoutError) as error:
                self._failed(error)
            else:
                self.problem = None
                log.info("credentials renewed; good for %.0f s", self._identity.left_s)
                if self._is_connected():
                    self._backoff.reset()
                    continue
            await asyncio.sleep(self._backoff.next_s())

    async def _until_due(self, part: float) -> None:
        """Return once it is time, once asked, or once there has been no connection for a while."""
        cut_off_since: float | None = None
        while self._identity.left_s > 0 and self._identity.renew_s(part) > 0:
            if self._is_connected():
                cut_off_since = None
            elif cut_off_since is None:
                cut_off_since = time.monotonic()
            elif time.monotonic() - cut_off_since >= CUT_OFF_S:
                return
            # The clock on the wall counts, and may be set; a timer would not see that, nor a machine's sleep.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LOOK_S):
                    await self._soon.wait()
                self._soon.clear()
                return

    async def _ask(self) -> str:
        path = f"/v1/executors/{self._identity.executor_id}/credentials"
        async with self._gateway.call("POST", path, _TIMEOUT) as answer:
            body = await answer.content.read(ANSWER_BYTES_MAX)
            if answer.status != 200:
                raise problem_of(answer.status, body)
        try:
            return msgspec.json.decode(body, type=_Answer).nats_jwt
        except msgspec.DecodeError as error:
            raise Unavailable(f"the gateway does not answer as one does: {error}") from error

    def _failed(self, error: Exception) -> None:
        self.problem = str(error) or type(error).__name__
        log.warning("credentials are not renewed: %s; trying again", self.problem)


def problem_of(status: int, body: bytes) -> HiveError:
    """Return the error of a problem document (RFC 9457), or Unavailable where the answer is none."""
    try:
        problem = msgspec.json.decode(body, type=dict[str, Any])
        return ErrorBody(problem["code"], problem["detail"], fields=problem).raised()
    except (msgspec.DecodeError, KeyError, TypeError):
        return Unavailable(f"the gateway answered {status}")
