"""Who vouches for everybody on NATS: the keys of an installation, what they issue, and what the server is told."""

import json
from pathlib import Path
from typing import Final, Self

import msgspec

from hive_common.bus.jwt import (
    DAY_S,
    Credentials,
    account_jwt,
    executor_jwt,
    new_seed,
    operator_jwt,
    public_nkey,
    system_account_jwt,
    user_jwt,
)
from hive_common.bus.policy import EXTENSION, policy


class Authority(msgspec.Struct, frozen=True, kw_only=True):
    """The private keys of an installation. All of them are secrets.

    Attributes:
        operator_seed: signs accounts.
        account_seed: of the account that everybody is in; signs services and extensions.
        system_seed: of the account that speaks to the server itself.
        signing_seed: signs executors, and can give them nothing that the template does not.
    """

    operator_seed: str
    account_seed: str
    system_seed: str
    signing_seed: str

    @classmethod
    def new(cls) -> Self:
        """Make keys that nobody has seen."""
        return cls(
            operator_seed=new_seed("operator"),
            account_seed=new_seed("account"),
            system_seed=new_seed("account"),
            signing_seed=new_seed("account"),
        )

    @property
    def account(self) -> str:
        """Public nkey of the account."""
        return public_nkey(self.account_seed)

    def account_jwt(self, issued_s: int, revoked: tuple[str, ...] = ()) -> str:
        """Return the account as a running server is given it; `revoked` are public nkeys of users."""
        return account_jwt(self.operator_seed, self.account, public_nkey(self.signing_seed), issued_s, revoked)

    def first_account_jwt(self, issued_s: int, revoked: tuple[str, ...] = ()) -> str:
        """Return the account as it stands in the server's configuration.

        Of the same second, the server would take it for newer than what it is given while running.
        """
        return self.account_jwt(issued_s - 1, revoked)

    def service(self, name: str, issued_s: int, seed: str = "") -> Credentials:
        """Return credentials of a service, for a new nkey or for one that it has; they do not expire."""
        return self._user(name, name, issued_s, seed)

    def extension(self, name: str, issued_s: int, expires_s: int | None = None) -> Credentials:
        """Return credentials of the extension `name`.

        Raises:
            InvalidArgument: the name would not be one token of a subject.
        """
        return self._user(EXTENSION, name, issued_s, "", expires_s)

    def executor(self, executor: str, seed: str, issued_s: int, valid_s: int = DAY_S) -> Credentials:
        """Return credentials of an executor whose nkey is known here."""
        jwt = executor_jwt(self.signing_seed, self.account, executor, public_nkey(seed), issued_s, valid_s)
        return Credentials(jwt, seed)

    def server_text(self, accounts_dir: Path, issued_s: int, account: str = "") -> str:
        """Return the part of the server's configuration that says whom it trusts. It holds no secrets.

        Args:
            accounts_dir: where the server keeps accounts that it was given while running, with their revocations.
                One of those counts for as long as it is newer than `account`.
            issued_s: seconds since the epoch.
            account: from `first_account_jwt`; without it one that revokes nobody.
        """
        system = public_nkey(self.system_seed)
        # Quoted: a key that begins with digits or has the shape of a size is otherwise no string to the server.
        return f"""operator: {_quoted(operator_jwt(self.operator_seed, system, issued_s))}
system_account: {_quoted(system)}
resolver {{
  type: full
  dir: {_quoted(str(accounts_dir))}
  allow_delete: false
  interval: "2m"
}}
resolver_preload {{
  {self.account}: {_quoted(account or self.first_account_jwt(issued_s))}
  {system}: {_quoted(system_account_jwt(self.operator_seed, system, issued_s))}
}}
"""

    def _user(
        self, identity: str, name: str, issued_s: int, seed: str, expires_s: int | None = None
    ) -> Credentials:
        what = policy()[identity].named(name)
        signer = self.system_seed if what.account == "system" else self.account_seed
        seed = seed or new_seed("user")
        return Credentials(user_jwt(signer, what, name, public_nkey(seed), issued_s, expires_s), seed)


_quoted: Final = json.dumps
