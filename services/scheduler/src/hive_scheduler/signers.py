"""Whose agents may be placed: the registry's decisions about signing keys, as the log has them."""

from hive_common.contracts.events import AgentRef
from hive_common.kernel.errors import PermissionDenied


class Signers:
    """Signing keys that are trusted, and those that were."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._streams: dict[str, str] = {}
        self._distrusted: dict[str, str] = {}
        self.position = 0
        """Of the last event about any key."""

    def trust(self, stream: str, public_key: str, name: str, position: int) -> None:
        """Take a key that is trusted from now on."""
        self._streams[stream] = public_key
        self._names[public_key] = name
        self._distrusted.pop(public_key, None)
        self.position = position

    def distrust(self, stream: str, reason: str, position: int) -> None:
        """Take back a key that was trusted."""
        self._distrusted[self._streams[stream]] = reason
        self.position = position

    def require(self, agent: AgentRef) -> None:
        """Refuse an agent that nobody signed whose key is trusted; asked for every attempt.

        Raises:
            PermissionDenied: says why, and what would change that.
        """
        if agent.signer in self._names and agent.signer not in self._distrusted:
            return
        what = f"{agent.name}@{agent.version}"
        if not agent.signer or not agent.signature:
            raise PermissionDenied(
                f"{what}: is not signed; push it again under a new version, with `hive agent push`", agent=what
            )
        name = self._names.get(agent.signer, "nobody known here")
        reason = self._distrusted.get(agent.signer, "")
        raise PermissionDenied(
            f"{what}: signed by the key {agent.signer} ({name}), which is not trusted"
            f"{': ' + reason if reason else ''}; "
            f"use a version that somebody else signed, or, if that is a mistake: "
            f"hive agent key trust {agent.signer}",
            agent=what,
            public_key=agent.signer,
        )
