"""Keys of authors: who is trusted, and what may be published under them.

    (unknown) ── trust ──→ trusted ←── trust ── distrust ──→ distrusted

Both may be said again, which changes nothing. What a distrusted key signed is neither placed nor run; trusting the
key again makes it usable again.
"""

from typing import Final

import msgspec
from hive_common.artifacts.keys import KEY_NAME_PATTERN, is_public_key
from hive_common.artifacts.signing import untrusted
from hive_common.contracts.events import AgentVersionYanked, Event, SigningKeyDistrusted, SigningKeyTrusted
from hive_common.kernel.errors import InvalidArgument, PermissionDenied

from hive_registry.domain.executors import check_text

REASON_CHARACTERS_MAX: Final = 500
TRUSTED_MAX: Final = 500
"""Keys that are trusted at the same time: executors are told all of them in one message."""


class SignerState(msgspec.Struct, frozen=True):
    """A key as the log has it. Version 0 is one that nobody has said anything about."""

    version: int = 0
    name: str = ""
    trusted: bool = False
    reason: str = ""


UNKNOWN: Final = SignerState()


def trust(state: SignerState, public_key: str, name: str) -> tuple[Event, ...]:
    """Decide that what the key signs may be published and run.

    Raises:
        InvalidArgument: not a key, or not a name.
    """
    check_key(public_key)
    if not KEY_NAME_PATTERN.match(name):
        raise InvalidArgument(
            f"name: got {name[:80]!r}; expected whose key it is: letters, digits and . _ - only, at most 64",
            path="name",
        )
    if state.trusted and state.name == name:
        return ()
    return (SigningKeyTrusted(public_key=public_key, name=name),)


def distrust(state: SignerState, reason: str) -> tuple[Event, ...]:
    """Decide that what the key signed may not run any more. Raises InvalidArgument for such a reason."""
    check_text("reason", reason, REASON_CHARACTERS_MAX)
    return (SigningKeyDistrusted(reason=reason),) if state.trusted else ()


def require_trusted(state: SignerState, what: str, public_key: str) -> None:
    """Refuse what was signed by a key that is not trusted. Raises PermissionDenied with what would change that."""
    if state.trusted:
        return
    if state.version == 0:
        raise untrusted(what, public_key)
    raise PermissionDenied(
        f"{what}: signed by the key {public_key} ({state.name}), which is distrusted here"
        f"{': ' + state.reason if state.reason else ''}; sign it with another one (--key), or, "
        f"if that was a mistake: hive agent key trust {public_key} --name {state.name}",
        public_key=public_key,
    )


def yank(yanked: bool, reason: str) -> tuple[Event, ...]:
    """Decide that no new job may use a version. Raises InvalidArgument for such a reason, or none."""
    check_text("reason", reason, REASON_CHARACTERS_MAX)
    if not reason.strip():
        raise InvalidArgument(
            "reason: is empty; expected why nobody should use it, for those who do", path="reason"
        )
    return () if yanked else (AgentVersionYanked(reason=reason),)


def check_key(public_key: str) -> None:
    """Refuse what is not a public key. Raises InvalidArgument."""
    if not is_public_key(public_key):
        raise InvalidArgument(
            f"public_key: got {public_key[:80]!r}; expected an Ed25519 public key of 64 hex digits",
            path="public_key",
        )
