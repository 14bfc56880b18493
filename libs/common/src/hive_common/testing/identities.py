"""Credentials for the NATS servers of tests, and for whoever watches a whole installation.

A service under test gets its own identity and nothing more, so that its tests notice a right that the policy lacks.
What stands in for the rest of the world gets `everything`.
"""

import json
import time
from pathlib import Path
from typing import Final

from hive_common.bus.authority import Authority
from hive_common.bus.jwt import Credentials, credentials_text, new_seed, public_nkey, user_jwt
from hive_common.bus.policy import Identity
from hive_common.ops.config import NatsConfig

EVERYTHING: Final = "everything"
_EVERYTHING: Final = Identity(account="hive", inbox="_SVC.everything", publish=(">",), subscribe=(">",))


class Issuer:
    """Writes credentials for the clients of one server.

    Args:
        authority: that the server trusts. An open server takes those of any.
        url: of the server.
    """

    def __init__(self, authority: Authority, url: str) -> None:
        self.authority = authority
        self.url = url

    def service(self, name: str, folder: Path) -> NatsConfig:
        """Return the configuration of a service, or of `everything`, with credentials written below `folder`."""
        now_s = int(time.time())
        if name != EVERYTHING:
            return self._config(folder / f"nats-{name}.creds", self.authority.service(name, now_s))
        seed = new_seed("user")
        jwt = user_jwt(self.authority.account_seed, _EVERYTHING, name, public_nkey(seed), now_s)
        return self._config(folder / f"nats-{name}.creds", Credentials(jwt, seed))

    def executor(self, executor: str, folder: Path) -> NatsConfig:
        """Return the configuration of an executor, with credentials written below `folder`."""
        made = self.authority.executor(executor, new_seed("user"), int(time.time()))
        return self._config(folder / f"nats-{executor}.creds", made)

    def _config(self, file: Path, made: Credentials) -> NatsConfig:
        file.touch(mode=0o600)
        file.write_text(credentials_text(made))
        return NatsConfig(self.url, str(file))


def authority_of(home: Path) -> Authority:
    """Return the keys of the installation in `home`, as its owner can read them."""
    keys = ("operator", "account", "system", "signing")
    return Authority(**{f"{key}_seed": (home / "secrets" / f"nats-{key}").read_text().strip() for key in keys})


def everything_in(home: Path, folder: Path | None = None) -> NatsConfig:
    """Return how to watch, and disturb, all that is said in the installation in `home`.

    The credentials are read at each new connection. They are written to `folder`, by default in the home.
    """
    url = json.loads((home / "hive.json").read_text())["endpoints"]["nats"]
    return Issuer(authority_of(home), url).service(EVERYTHING, folder or home / "run")
