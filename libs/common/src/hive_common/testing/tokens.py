"""Capability tokens as the scheduler mints them."""

from typing import Any

from hive_common.contracts.permissions import ModelPermission, Permissions
from hive_common.permissions.tokens import Claims, Minter, new_key, public_key

MODELS = Permissions(model=ModelPermission(("*",), 1_000_000))
"""May call every model."""

FAR_US = 1 << 60


class TokenKey:
    """The root key of an installation.

    Attributes:
        private: in hex, as it stands in `secrets/token-key`.
        public: what verifies.
    """

    def __init__(self) -> None:
        self.private = new_key()
        self.public = public_key(self.private)
        self._minter = Minter(self.private)

    def token(self, executor: str, permissions: Permissions = MODELS, **claims: Any) -> str:
        """Return the token of an attempt that this executor holds."""
        said: dict[str, Any] = {
            "executor": executor,
            "key": "",
            "job": "job-1",
            "task": "task-1",
            "attempt": 1,
            "permissions": permissions,
            "expires_us": FAR_US,
        }
        return self._minter.mint(Claims(**(said | claims)))
