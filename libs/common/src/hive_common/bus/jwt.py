"""NATS identities: nkeys, the claims of operator, account and user, and credentials files.

The format is NATS' JWT, version 2: an ordinary JWT in the algorithm `ed25519-nkey`, whose issuer is the public
nkey that signed it. Wrong claims are refused by the server, or give rights that nobody meant to give:

- a user that a scoped key has signed may carry no permissions or limits of its own, and names its account;
- an allow-list that is empty allows everything: whoever may nothing gets a denial of `>`;
- the system account has no JetStream limits.
"""

import base64
import hashlib
import secrets
from collections.abc import Collection
from pathlib import Path
from typing import Any, Final, Literal

import msgspec
import nkeys  # type: ignore[import-untyped]

from hive_common.bus.policy import EXECUTOR, Identity, policy
from hive_common.kernel import nkey
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import read_secret

DAY_S: Final = 86_400
FOR_EVER_S: Final = 253_402_300_799
"""The last second of the year 9999: credentials issued until then are revoked, whatever clock issued them."""

_PREFIXES: Final = {
    "operator": nkeys.PREFIX_BYTE_OPERATOR,
    "account": nkeys.PREFIX_BYTE_ACCOUNT,
    "user": nkeys.PREFIX_BYTE_USER,
}
_UNLIMITED: Final = {"subs": -1, "data": -1, "payload": -1}
_ACCOUNT_LIMITS: Final = _UNLIMITED | {"imports": -1, "exports": -1, "wildcards": True, "conn": -1, "leaf": 0}
_JETSTREAM_LIMITS: Final = {"mem_storage": -1, "disk_storage": -1, "streams": -1, "consumer": -1}
# No websocket, MQTT or leafnode, should somebody open a listener for those.
_CONNECTIONS: Final = {"allowed_connection_types": ["STANDARD"]}
_HEADER: Final = {"typ": "JWT", "alg": "ed25519-nkey"}


class Credentials(msgspec.Struct, frozen=True):
    """What a `.creds` file holds. `seed` is the secret."""

    jwt: str
    seed: str


def new_seed(kind: Literal["operator", "account", "user"]) -> str:
    """Return a new private nkey."""
    seed: bytes = nkeys.encode_seed(secrets.token_bytes(32), _PREFIXES[kind])
    return seed.decode()


def public_nkey(seed: str) -> str:
    """Return the public nkey of a seed.

    Raises:
        InvalidArgument: it is no seed. The message does not show it.
    """
    public: bytes = _pair(seed).public_key
    return public.decode()


def sign(claims: dict[str, Any], seed: str, issued_s: int) -> str:
    """Return claims as a JWT, signed with `seed`."""
    pair = _pair(seed)
    body = claims | {"iat": issued_s, "iss": pair.public_key.decode()}
    body["jti"] = base64.b32encode(hashlib.sha256(_json(body)).digest()).decode().rstrip("=")
    signed = f"{_base64(_json(_HEADER))}.{_base64(_json(body))}"
    return f"{signed}.{_base64(pair.sign(signed.encode()))}"


def claims_of(jwt: str) -> dict[str, Any]:
    """Return the claims of a JWT, without a look at its signature: for one's own.

    Raises:
        InvalidArgument: it is none.
    """
    try:
        _, body, _ = jwt.split(".")
        return msgspec.json.decode(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)), type=dict[str, Any])
    except ValueError as error:
        raise InvalidArgument("expected a JWT: three parts in base64url with '.' between them") from error


def operator_jwt(operator_seed: str, system_account: str, issued_s: int) -> str:
    """Return the claims of the operator, who signs accounts.

    Args:
        operator_seed: its own.
        system_account: public nkey of the account that speaks to the server itself.
        issued_s: seconds since the epoch.
    """
    nats = {"type": "operator", "version": 2, "system_account": system_account}
    return sign({"sub": public_nkey(operator_seed), "name": "hivefabric", "nats": nats}, operator_seed, issued_s)


def system_account_jwt(operator_seed: str, account: str, issued_s: int) -> str:
    """Return the claims of the system account, with the public nkey `account`."""
    nats = {"type": "account", "version": 2, "limits": _ACCOUNT_LIMITS}
    return sign({"sub": account, "name": "system", "nats": nats}, operator_seed, issued_s)


def account_jwt(
    operator_seed: str, account: str, executor_signer: str, issued_s: int, revoked: Collection[str] = ()
) -> str:
    """Return the claims of the account that everybody is in.

    Args:
        operator_seed: signs it.
        account: its public nkey.
        executor_signer: public nkey that signs executors; what those may do is the policy's template.
        issued_s: seconds since the epoch.
        revoked: public nkeys of users that are disconnected and refused for ever.
    """
    signer = {
        "kind": "user_scope",
        "key": executor_signer,
        "role": EXECUTOR,
        "template": _permissions(policy()[EXECUTOR]),
    }
    nats: dict[str, Any] = {
        "type": "account",
        "version": 2,
        "limits": _ACCOUNT_LIMITS | _JETSTREAM_LIMITS,
        "signing_keys": [signer],
    }
    if revoked:
        nats["revocations"] = dict.fromkeys(sorted(revoked), FOR_EVER_S)
    return sign({"sub": account, "name": "hive", "nats": nats}, operator_seed, issued_s)


def user_jwt(
    account_seed: str, identity: Identity, name: str, user: str, issued_s: int, expires_s: int | None = None
) -> str:
    """Return the claims of a user that carries its permissions itself: a service, or an extension.

    Args:
        account_seed: of the account that `identity` belongs to.
        identity: already `named` where it is a template.
        name: shown in the server's monitoring.
        user: public nkey of the user.
        issued_s: seconds since the epoch.
        expires_s: likewise; None is never.
    """
    nats = {"type": "user", "version": 2} | _permissions(identity)
    claims: dict[str, Any] = {"sub": user, "name": name, "nats": nats}
    if expires_s is not None:
        claims["exp"] = expires_s
    return sign(claims, account_seed, issued_s)


def executor_jwt(
    signing_seed: str, account: str, executor: str, user: str, issued_s: int, valid_s: int = DAY_S
) -> str:
    """Return the claims of an executor. What it may do is the template that the account has for the signing key.

    Args:
        signing_seed: the scoped key of executors.
        account: public nkey of the account.
        executor: id; the only one whose subjects it can use.
        user: public nkey that the executor has made.
        issued_s: seconds since the epoch.
        valid_s: seconds until it has to be renewed.

    Raises:
        InvalidArgument: `executor` or `user` is not what it has to be. The server would fill a wildcard into its
            template, and give this executor the subjects of all.
    """
    policy()[EXECUTOR].named(executor)
    nkey.public_key(user)
    nats = {"type": "user", "version": 2, "issuer_account": account}
    claims = {"sub": user, "name": executor, "exp": issued_s + valid_s, "nats": nats}
    return sign(claims, signing_seed, issued_s)


def credentials_text(credentials: Credentials) -> str:
    """Return the content of a `.creds` file, as all NATS clients and tools take it."""
    return (
        f"-----BEGIN NATS USER JWT-----\n{credentials.jwt}\n------END NATS USER JWT------\n\n"
        f"-----BEGIN USER NKEY SEED-----\n{credentials.seed}\n------END USER NKEY SEED------\n"
    )


def read_credentials(path: str | Path) -> Credentials:
    """Read a `.creds` file.

    Raises:
        InvalidArgument: it cannot be read, others than its owner may read it, or it is something else.
    """
    lines = read_secret(path).splitlines()
    try:
        jwt = lines[lines.index("-----BEGIN NATS USER JWT-----") + 1]
        seed = lines[lines.index("-----BEGIN USER NKEY SEED-----") + 1]
    except (ValueError, IndexError) as error:
        raise InvalidArgument(
            f"{path}: expected NATS credentials: a user JWT and an nkey seed", file=str(path)
        ) from error
    return Credentials(jwt, seed)


def _permissions(identity: Identity) -> dict[str, Any]:
    limits = _UNLIMITED | {"subs": identity.subscriptions_max}
    return {"pub": _allow(identity.publish), "sub": _allow(identity.subscribe)} | limits | _CONNECTIONS


def _allow(subjects: tuple[str, ...]) -> dict[str, list[str]]:
    return {"allow": list(subjects)} if subjects else {"deny": [">"]}


def _pair(seed: str) -> nkeys.KeyPair:
    try:
        return nkeys.from_seed(bytearray(seed.encode()))
    except (nkeys.NkeysError, ValueError) as error:
        raise InvalidArgument("expected the seed of an nkey: it starts with S") from error


def _json(value: dict[str, Any]) -> bytes:
    return msgspec.json.encode(value)


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
