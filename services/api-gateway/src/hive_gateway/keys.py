"""Who calls: API keys, compared in constant time, and what each of them may do."""

import hashlib
import hmac
from collections.abc import Iterable
from typing import Final, Literal, NamedTuple

from hive_common.inference.calls import PIN_ANY, narrowed
from hive_common.kernel.errors import InvalidArgument, Unauthenticated
from hive_common.kernel.ids import derive_id
from hive_common.ops.config import read_secret

from hive_gateway.settings import KeySettings

Scope = Literal["admin", "user", "executor"]
"""What each may do stands in `rights`. Executors have no key: see `devices`."""

WITHOUT_KEY: Final = "without-key"
"""Name of whoever calls models from this machine without a key."""


class Caller(NamedTuple):
    """Who made a call. `pseudonym` is what other services and the log get to see of it.

    `pin`, `counts_only` and `cloud` hold for its model calls.
    """

    name: str
    scope: Scope
    pseudonym: str
    pin: str = PIN_ANY
    counts_only: bool = False
    cloud: bool = False


class KeyRing:
    """The keys of the configuration; `holders` knows all others.

    Args:
        keys: who each secret belongs to.
    """

    def __init__(self, keys: Iterable[tuple[Caller, str]]) -> None:
        # Digests have one length, so that a comparison does not tell how long a key is.
        self._keys = [(caller, _digest(secret.encode())) for caller, secret in keys]

    @classmethod
    def load(cls, keys: Iterable[KeySettings], owner: str) -> "KeyRing":
        """Read the keys from their files.

        Raises:
            InvalidArgument: a file cannot be read, others may read it, or two keys have one name or one secret.
        """
        loaded = [(_caller(key, owner), read_secret(key.file)) for key in keys]
        for what, values in (
            ("name", [caller.name for caller, _ in loaded]),
            ("secret", [s for _, s in loaded]),
        ):
            if len(set(values)) != len(values):
                raise InvalidArgument(f"configuration of the gateway, extra.keys: two keys have the same {what}")
        return cls(loaded)

    def without_key(self, owner: str) -> Caller:
        """Return who calls models without a key; `pin` and `counts_only` are the first key's, the owner's."""
        first = self._keys[0][0]
        return first._replace(name=WITHOUT_KEY, pseudonym=derive_id("caller", owner, WITHOUT_KEY), cloud=False)

    def caller(self, authorization: str | bytes | None) -> Caller:
        """Return who shows `authorization: Bearer <key>` (RFC 6750 section 2.1).

        Raises:
            Unauthenticated: there is no such header, or the key is not known.
        """
        value = authorization.encode() if isinstance(authorization, str) else authorization or b""
        scheme, _, token = value.partition(b" ")
        given = _digest(token.strip())
        found: Caller | None = None
        # Every key is compared, so that the time does not tell which one was close.
        for caller, digest in self._keys:
            if hmac.compare_digest(given, digest):
                found = caller
        if found is None or scheme.lower() != b"bearer":
            raise Unauthenticated("this needs an API key: expected the header `Authorization: Bearer <key>`")
        return found


def bearer_of(authorization: str | None) -> str:
    """Return what an `Authorization` header shows after `Bearer`, or nothing."""
    scheme, _, token = (authorization or "").partition(" ")
    return token.strip() if scheme.lower() == "bearer" else ""


def _caller(key: KeySettings, owner: str) -> Caller:
    try:
        pin = narrowed(PIN_ANY, key.pin)
    except InvalidArgument as error:
        raise InvalidArgument(f"configuration of the gateway, extra.keys, `{key.name}`: {error.message}") from error
    return Caller(key.name, key.scope, derive_id("caller", owner, key.name), pin, key.counts_only, key.cloud)


def _digest(secret: bytes) -> bytes:
    return hashlib.sha256(secret).digest()
