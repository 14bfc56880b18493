"""Join tokens, and what a machine that shows one gets.

    (unknown) ── issue ──→ open ── enrol ──→ used
                             └── time ──→ expired

A token admits one machine. Its stream's version sees to that: of two who show it at the same time, one append meets
another version. The executor's id follows from its key, so that a key joins once, with whatever token.
"""

import hashlib
import hmac
from typing import Final

import msgspec
from hive_common.contracts.events import Event, ExecutorEnrolled, JoinTokenIssued, JoinTokenUsed
from hive_common.contracts.joining import proof_of
from hive_common.kernel.errors import (
    Conflict,
    FailedPrecondition,
    InvalidArgument,
    PermissionDenied,
    Unauthenticated,
    UnknownEvent,
)
from hive_common.kernel.ids import derive_id
from hive_common.kernel.nkey import is_signed, public_key

from hive_registry.domain.executors import NAME_CHARACTERS_MAX, ExecutorState, check_name, check_text

VALID_S_DEFAULT: Final = 3_600
VALID_S_MIN: Final = 60
VALID_S_MAX: Final = 7 * 24 * 3_600
SECRET_CHARACTERS_MAX: Final = 256
_US: Final = 1_000_000
_HOW: Final = "make a new one on the first machine with: hive executor token"


class TokenState(msgspec.Struct, frozen=True):
    """A token as the log has it. Version 0 is one that was never issued; `executor` is who used it."""

    version: int = 0
    digest: str = ""
    expires_us: int = 0
    owner: str = ""
    owner_name: str = ""
    executor: str = ""


NEVER_ISSUED: Final = TokenState()


class Enrolment(msgspec.Struct, frozen=True):
    """What a joining machine shows. `proof` is `proof_of(token_id, name)`, signed by `public_key`."""

    token_id: str
    secret: str
    public_key: str
    name: str
    proof: bytes

    @property
    def executor(self) -> str:
        """The id of the executor that this key makes."""
        return derive_id("executor", self.public_key)

    def __repr__(self) -> str:
        return f"Enrolment({self.token_id})"


class Admission(msgspec.Struct, frozen=True):
    """Events of an enrolment, by stream; none where the same machine asks again."""

    token: tuple[Event, ...] = ()
    executor: tuple[Event, ...] = ()


def digest_of_secret(secret: str) -> str:
    """Return what is kept of a token's secret: SHA-256 in hex. Of 256 random bits, so that no salt is needed."""
    return hashlib.sha256(secret.encode()).hexdigest()


def issue(digest: str, valid_s: int, owner: str, owner_name: str, now_us: int) -> tuple[Event, ...]:
    """Return the events of a new token.

    Args:
        digest: of its secret.
        valid_s: how long it may be used; 0 takes an hour.
        owner: pseudonym of who will own the machine.
        owner_name: for people; empty for the installation's owner.
        now_us: the time.

    Raises:
        InvalidArgument: the time or the name is beyond its bound.
    """
    if valid_s and not VALID_S_MIN <= valid_s <= VALID_S_MAX:
        raise InvalidArgument(
            f"valid_s: got {valid_s}; expected {VALID_S_MIN} to {VALID_S_MAX} seconds", path="valid_s"
        )
    check_text("owner", owner_name, NAME_CHARACTERS_MAX)
    expires_us = now_us + (valid_s or VALID_S_DEFAULT) * _US
    return (JoinTokenIssued(digest=digest, expires_us=expires_us, owner=owner, owner_name=owner_name),)


def enrol(token: TokenState, executor: ExecutorState, shown: Enrolment, now_us: int) -> Admission:
    """Decide on a machine that wants to join.

    The same machine may ask again with the same token, after an answer that it never saw: nothing happens then.

    Args:
        token: the one that is shown.
        executor: of the key that is shown.
        shown: by the machine.
        now_us: the time.

    Raises:
        InvalidArgument: the name or the key is none, or the proof does not fit the key.
        Unauthenticated: the token is not of this installation, or its secret is wrong.
        FailedPrecondition: the token has expired, or another machine has used it.
        Conflict: the key has joined with another token.
        PermissionDenied: the key was revoked.
    """
    check_name(shown.name)
    key = public_key(shown.public_key)
    _check_token(token, shown)
    if not is_signed(shown.proof, proof_of(shown.token_id, shown.name), key):
        raise InvalidArgument(
            "proof: not this key's signature of this token's id and this name; expected one of its holder",
            path="proof",
        )
    if executor.revoked:
        raise PermissionDenied("this key was revoked, for ever; join with a new one", reason="revoked")
    if token.executor:
        if token.executor != shown.executor:
            raise FailedPrecondition(f"this token was used by another machine; each works once: {_HOW}")
        return Admission()
    if now_us >= token.expires_us:
        raise FailedPrecondition(f"this token has expired; {_HOW}")
    if executor.public_key:
        raise Conflict("this key has joined already, with another token; nothing is left to do")
    return Admission(
        (JoinTokenUsed(executor=shown.executor),),
        (
            ExecutorEnrolled(
                name=shown.name,
                public_key=shown.public_key,
                owner=token.owner,
                token=shown.token_id,
                owner_name=token.owner_name,
            ),
        ),
    )


def _check_token(token: TokenState, shown: Enrolment) -> None:
    if token.version == 0:
        raise Unauthenticated(f"this installation never issued such a token; {_HOW}")
    given = digest_of_secret(shown.secret[:SECRET_CHARACTERS_MAX])
    if not hmac.compare_digest(given, token.digest):
        raise Unauthenticated("the secret of this token is wrong; expected the whole token as it was printed")


def evolve_token(state: TokenState, event: Event) -> TokenState:
    """Return the state after `event`. Raises UnknownEvent for one that is not about tokens (law 11)."""
    version = state.version + 1
    match event:
        case JoinTokenIssued():
            return TokenState(version, event.digest, event.expires_us, event.owner, event.owner_name)
        case JoinTokenUsed():
            return msgspec.structs.replace(state, version=version, executor=event.executor)
    raise UnknownEvent(f"a token's stream holds a {type(event).__name__}")
