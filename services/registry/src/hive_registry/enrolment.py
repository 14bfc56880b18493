"""Who may take part: tokens, enrolment, credentials and revocation."""

import logging
import secrets
from collections.abc import Sequence
from functools import partial
from typing import Final

from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument, NotFound, VersionConflict
from hive_common.kernel.ids import derive_id, is_id, new_id
from hive_proto.executors.v1 import executors_pb2

from hive_registry.desk import ExecutorDesk
from hive_registry.domain.executors import UNKNOWN, check_enrolled, enrol_local, revoke
from hive_registry.domain.tokens import NEVER_ISSUED, Enrolment, TokenState, digest_of_secret, enrol, issue
from hive_registry.identities import Revocations, Signer
from hive_registry.log_access import TRIES_MAX, Entry, LogAccess
from hive_registry.settings import LocalExecutor
from hive_registry.views import ExecutorRow, Views

log = logging.getLogger(__name__)

_SECRET_BYTES: Final = 32
REGISTRY: Final = "registry"


class Identities:
    """What the registry has where NATS asks for credentials."""

    def __init__(self, signer: Signer, revocations: Revocations) -> None:
        self.signer = signer
        self.revocations = revocations


class EnrolmentDesk:
    """Admits machines and shuts them out again.

    Args:
        views: reads.
        log_access: writes.
        desk: of executors.
        clock: says whether a token has expired.
        owner: pseudonym of the installation's owner.
        nats_url: where executors connect.
        blobs_url: base URL of the gateway.
        identities: signs credentials; None where NATS is open.
        kill_public_key: goes with the credentials, so that kill orders are obeyed.
        token_public_key: likewise, so that capability tokens can be checked.
    """

    def __init__(
        self,
        views: Views,
        log_access: LogAccess,
        desk: ExecutorDesk,
        clock: Clock,
        *,
        owner: str,
        nats_url: str,
        blobs_url: str,
        identities: Identities | None,
        kill_public_key: str = "",
        token_public_key: str = "",
    ) -> None:
        self._views = views
        self._log = log_access
        self._desk = desk
        self._clock = clock
        self._owner = owner
        self._nats_url = nats_url
        self._blobs_url = blobs_url
        self._identities = identities
        self._kill_public_key = kill_public_key
        self._token_public_key = token_public_key

    async def issue(self, valid_s: int, owner_name: str, actor: str) -> executors_pb2.IssueTokenResponse:
        """Make a token. Its secret is in the answer, and nowhere else.

        Raises:
            InvalidArgument: the time or the name is beyond its bound.
            FailedPrecondition: this registry cannot sign credentials.
        """
        self._signer()
        token, secret = new_id(), secrets.token_urlsafe(_SECRET_BYTES)
        now_us = self._clock.now_us()
        events = issue(digest_of_secret(secret), valid_s, self._pseudonym(owner_name), owner_name, now_us)
        await self._log.append(token, 0, events, actor)
        state = await self._token(token)
        return executors_pb2.IssueTokenResponse(token_id=token, secret=secret, expires_us=state.expires_us)

    async def enrol(self, shown: Enrolment) -> executors_pb2.Credentials:
        """Take a machine in. Of several who show one token at the same time, one gets in.

        Raises:
            HiveError: as `domain.tokens.enrol`; nothing is changed then.
        """
        self._signer()
        if not is_id(shown.token_id):
            raise InvalidArgument("token_id: expected the id of a token: a UUID in lower case", path="token_id")
        for tries_left in reversed(range(TRIES_MAX)):
            # In this order: where a machine is seen to have joined, its token is then seen to be used.
            row = await self._desk.look(shown.executor)
            token = await self._token(shown.token_id)
            state = UNKNOWN if row is None else row.state
            admitted = enrol(token, state, shown, self._clock.now_us())
            if not admitted.executor:
                break
            entries = (
                Entry(shown.token_id, token.version, admitted.token),
                Entry(shown.executor, state.version, admitted.executor, token.owner),
            )
            try:
                await self._log.append_all(entries, shown.executor)
                log.info("executor %s joined with token %s", shown.executor, shown.token_id)
                break
            except VersionConflict:
                if not tries_left:
                    raise
                await self._log.catch_up()
        return await self.renew(shown.executor)

    async def renew(self, executor: str) -> executors_pb2.Credentials:
        """Return fresh credentials.

        Raises:
            NotFound: there is no such executor.
            FailedPrecondition: it is not enrolled, or this registry cannot sign.
            PermissionDenied: it is revoked.
        """
        row = await self._desk.look(executor)
        if row is None:
            raise NotFound(f"there is no executor {executor}")
        check_enrolled(row.state)
        signed = self._signer().executor(executor, row.public_key)
        return executors_pb2.Credentials(
            executor_id=executor,
            owner=row.owner,
            nats_jwt=signed.jwt,
            expires_us=signed.expires_us,
            nats_url=self._nats_url,
            blobs_url=self._blobs_url,
            kill_public_key=self._kill_public_key,
            token_public_key=self._token_public_key,
        )

    async def revoke(self, executor: str, reason: str, actor: str) -> ExecutorRow:
        """Shut an executor out, for ever: the event first, then NATS is told, at once. Raises as `desk.change`."""
        row = await self._desk.change(executor, actor, lambda state: revoke(state, reason))
        if self._identities is not None:
            revocations = self._identities.revocations
            if not await revocations.wait_for(revocations.again()):
                log.warning("executor %s is revoked, but NATS was not told yet; it will be", executor)
        return row

    async def enrol_locals(self, local: Sequence[LocalExecutor]) -> None:
        """Enrol the executors of this machine that are not yet, or whose key is another now.

        Raises:
            InvalidArgument: an id, a name or a key of the configuration is none.
        """
        for number, one in enumerate(local):
            if not is_id(one.id):
                path = f"extra.local_executors[{number}].id"
                raise InvalidArgument(f"configuration of the registry, {path}: expected a UUID", path=path)
            decide = partial(enrol_local, name=one.name, key=one.public_key, owner=self._owner)
            row = await self._desk.change(one.id, REGISTRY, decide)
            if row.revoked_us is not None:
                log.warning("executor %s of this machine is revoked; it stays so", one.name)

    async def _token(self, token: str) -> TokenState:
        return await self._views.token(token) or NEVER_ISSUED

    def _pseudonym(self, owner_name: str) -> str:
        return derive_id("owner", self._owner, owner_name) if owner_name else self._owner

    def _signer(self) -> Signer:
        if self._identities is None:
            raise FailedPrecondition(
                "this registry has no keys to sign with: configuration of the registry, extra.identities"
            )
        return self._identities.signer
