"""Who is who on NATS in a home: its keys, made once, and what they issue at every start."""

import contextlib
import time
from typing import Any

from hive_common.bus.authority import Authority
from hive_common.bus.jwt import (
    Credentials,
    claims_of,
    credentials_text,
    new_seed,
    public_nkey,
    read_credentials,
)
from hive_common.bus.policy import REGISTRY_SYSTEM
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import read_secret
from hive_common.ops.files import replace_file

from hive_cli.home import Home, Settings
from hive_cli.supervisor import names

OPERATOR = "nats-operator"
ACCOUNT = "nats-account"
SYSTEM = "nats-system"
SIGNING = "nats-signing"
_KINDS = {OPERATOR: "operator", ACCOUNT: "account", SYSTEM: "account", SIGNING: "account"}
ACCOUNT_CLAIMS = "nats-account.jwt"
_NOT_COMPARED = ("iat", "jti")


def credentials_name(identity: str) -> str:
    """Return the name of the secret with the credentials of a service or an executor."""
    return f"nats-{identity}.creds"


def service_identities(service: str) -> tuple[str, ...]:
    """Return the identities on NATS that a service has."""
    return (service, REGISTRY_SYSTEM) if service == names.REGISTRY else (service,)


def authority_of(home: Home) -> Authority:
    """Return the keys of a home.

    Raises:
        InvalidArgument: one of them cannot be read.
    """
    return Authority(
        operator_seed=read_secret(home.secret_file(OPERATOR)),
        account_seed=read_secret(home.secret_file(ACCOUNT)),
        system_seed=read_secret(home.secret_file(SYSTEM)),
        signing_seed=read_secret(home.secret_file(SIGNING)),
    )


def issue(home: Home, settings: Settings) -> None:
    """Make the keys that a home does not have, and credentials for everybody who is started from it.

    Those of services are written again where the policy or a key has changed; those of executors, which are good
    for a day, each time, for the nkey that the executor has.

    Raises:
        InvalidArgument: a file of these is damaged.
        OSError: something cannot be written.
    """
    for name, kind in _KINDS.items():
        if not home.secret_file(name).exists():
            _write(home, name, new_seed(kind) + "\n")  # type: ignore[arg-type]
    authority, now_s = authority_of(home), int(time.time())
    for service in names.SERVICES:
        for identity in service_identities(service):
            known = _known(home, identity)
            made = authority.service(identity, now_s, known.seed if known else "")
            if known is None or not _says_the_same(known.jwt, made.jwt):
                _write(home, credentials_name(identity), credentials_text(made))
    for entry in settings.executors:
        known = _known(home, entry.name)
        made = authority.executor(entry.id, known.seed if known else new_seed("user"), now_s)
        _write(home, credentials_name(entry.name), credentials_text(made))
    _write_account(home, authority, now_s)


def trust(home: Home) -> str:
    """Return the part of the server's configuration that says whom it trusts."""
    account = home.secret_file(ACCOUNT_CLAIMS).read_text().strip()
    return authority_of(home).server_text(home.nats_accounts_dir, claims_of(account)["iat"], account)


def registry_settings(home: Home, settings: Settings) -> dict[str, Any]:
    """Return what the registry is told of identities: with what it signs, and who is here already."""
    return {
        "identities": {
            "account": authority_of(home).account,
            "operator_seed_file": str(home.secret_file(OPERATOR)),
            "executor_signer_seed_file": str(home.secret_file(SIGNING)),
            "system_credentials_file": str(home.secret_file(credentials_name(REGISTRY_SYSTEM))),
        },
        "local_executors": [
            {
                "id": entry.id,
                "name": entry.name,
                "public_key": public_nkey(read_credentials(home.secret_file(credentials_name(entry.name))).seed),
            }
            for entry in settings.executors
        ],
    }


def _known(home: Home, identity: str) -> Credentials | None:
    file = home.secret_file(credentials_name(identity))
    return read_credentials(file) if file.exists() else None


def _write_account(home: Home, authority: Authority, now_s: int) -> None:
    """Write the account that the server begins with, where the policy or a key has changed.

    The server takes the newer one of this and of what the registry has given it. So that nobody who was revoked
    comes in until the registry gives it again, a new one takes the revocations over.
    """
    file = home.secret_file(ACCOUNT_CLAIMS)
    revoked: tuple[str, ...] = ()
    with contextlib.suppress(OSError, InvalidArgument):
        kept = (home.nats_accounts_dir / f"{authority.account}.jwt").read_text()
        revoked = tuple(claims_of(kept)["nats"].get("revocations", ()))
    if file.exists() and _says_the_same(file.read_text().strip(), authority.first_account_jwt(now_s)):
        return
    _write(home, ACCOUNT_CLAIMS, authority.first_account_jwt(now_s, revoked) + "\n")


def _says_the_same(one: str, other: str) -> bool:
    first, second = claims_of(one), claims_of(other)
    for name in _NOT_COMPARED:
        first.pop(name, None)
        second.pop(name, None)
    first["nats"].pop("revocations", None)
    return first == second


def _write(home: Home, name: str, text: str) -> None:
    replace_file(home.secret_file(name), text.encode(), mode=0o600)
