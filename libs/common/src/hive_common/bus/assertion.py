"""How an executor shows at the gateway who it is: a JWT that it signs itself, good for a minute (RFC 7523).

It is signed with the nkey with which the executor also connects to NATS (EdDSA, RFC 8037), so that a device has one
secret only, which never leaves it. Nothing that passes the gateway is worth anything after a minute.
"""

from typing import Any, Final, NamedTuple

import jwt
import nkeys  # type: ignore[import-untyped]
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from hive_common.kernel.errors import Unauthenticated
from hive_common.kernel.ids import is_id

AUDIENCE: Final = "hive-gateway"
VALID_S: Final = 60
SKEW_S_MAX: Final = 60
"""How far the clocks of a device and of the gateway may be apart."""

CHARACTERS_MAX: Final = 1024
"""One of ours has some 350."""

_ALGORITHM: Final = "EdDSA"
_CHECKED_HERE: Final[Any] = {
    "require": ["sub", "aud", "iat", "exp"],
    # The library's own sentences do not say by how much a clock is off.
    "verify_iat": False,
    "verify_exp": False,
    "verify_nbf": False,
}


class Assertion(NamedTuple):
    """What a verified assertion says. `expires_s` is on the gateway's clock, in seconds since the epoch."""

    executor: str
    expires_s: float


def private_key(seed: str) -> Ed25519PrivateKey:
    """Return the key of an nkey seed (`SU…`). Raises nkeys' errors where it is none."""
    _, raw = nkeys.decode_seed(bytearray(seed.encode()))
    return Ed25519PrivateKey.from_private_bytes(bytes(raw))


def make(key: Ed25519PrivateKey, executor: str, now_s: float) -> str:
    """Return a fresh assertion.

    Args:
        key: of the executor.
        executor: its id.
        now_s: seconds since the epoch.
    """
    issued_s = int(now_s)
    claims = {"iss": executor, "sub": executor, "aud": AUDIENCE, "iat": issued_s, "exp": issued_s + VALID_S}
    return jwt.encode(claims, key, algorithm=_ALGORITHM)


def executor_of(token: str) -> str:
    """Return the executor that an assertion names, before anything of it is verified.

    Raises:
        Unauthenticated: it is not an assertion.
    """
    try:
        subject: Any = jwt.decode(token, options={"verify_signature": False}).get("sub")
    except jwt.InvalidTokenError as error:
        raise _not_one() from error
    if not isinstance(subject, str) or not is_id(subject):
        raise _not_one()
    return subject


def verify(token: str, key: Ed25519PublicKey, now_s: float) -> Assertion:
    """Check an assertion against the key of the executor that it names.

    Args:
        token: what was shown.
        key: of the executor that `executor_of` says.
        now_s: seconds since the epoch on this machine.

    Raises:
        Unauthenticated: the signature, the audience or the times are wrong. Where a clock is off, the message says
            by how much, and `skew_s` too.
    """
    try:
        claims = jwt.decode(token, key, algorithms=[_ALGORITHM], audience=AUDIENCE, options=_CHECKED_HERE)
    except jwt.InvalidTokenError as error:
        raise Unauthenticated(f"the executor's assertion is not good: {error}") from error
    issued_s, expires_s = claims["iat"], claims["exp"]
    if not isinstance(issued_s, int) or not isinstance(expires_s, int):
        raise _not_one()
    if not 0 < expires_s - issued_s <= VALID_S:
        raise Unauthenticated(f"the executor's assertion is good for more than {VALID_S} s; expected at most that")
    ahead_s = issued_s - now_s
    if ahead_s > SKEW_S_MAX or now_s > expires_s + SKEW_S_MAX:
        raise Unauthenticated(clock_sentence(ahead_s), skew_s=int(ahead_s))
    return Assertion(claims["sub"], min(expires_s + SKEW_S_MAX, now_s + VALID_S))


def clock_sentence(ahead_s: float) -> str:
    """Return what to say about a device whose clock is `ahead_s` seconds before the installation's (or behind)."""
    way = "ahead of" if ahead_s > 0 else "behind"
    return (
        f"this machine's clock is {abs(ahead_s):.0f} s {way} the installation's, at most {SKEW_S_MAX} s go; "
        "set it, and let it be kept (such as with: timedatectl set-ntp true)"
    )


def _not_one() -> Unauthenticated:
    return Unauthenticated("not an assertion of an executor; expected a JWT signed with its nkey")
