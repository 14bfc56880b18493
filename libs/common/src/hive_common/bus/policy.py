"""Who may say and hear what on NATS: reads and checks `policy.toml`, the only place that says so."""

import functools
import re
import tomllib
from importlib.resources import files
from typing import Final, Literal

import msgspec

from hive_common.kernel.errors import InvalidArgument

NAME: Final = "{{name()}}"
"""Stands for the name in the credentials; the NATS server fills it in where it holds the template."""

EXECUTOR: Final = "executor"
EXTENSION: Final = "extension"
REGISTRY_SYSTEM: Final = "registry-system"
_TOKEN = re.compile(r"[A-Za-z0-9_$-]+|\*|" + re.escape(NAME))
_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")


class Identity(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one kind of client may do; what is not listed is refused.

    Attributes:
        account: `hive`, or `system` for what speaks to the server itself.
        inbox: prefix of its reply subjects.
        publish: subjects that it may publish to.
        subscribe: subjects that it may subscribe to.
        scoped: the server keeps this as the template of a signing key.
        subscriptions_max: how many it may have at a time; -1 is without end.
    """

    account: Literal["hive", "system"]
    inbox: str
    publish: tuple[str, ...]
    subscribe: tuple[str, ...]
    scoped: bool = False
    subscriptions_max: int = -1

    def named(self, name: str) -> "Identity":
        """Return the identity of the one client with this name.

        Raises:
            InvalidArgument: the name would not be one token of a subject.
        """
        if _NAME.fullmatch(name) is None:
            raise InvalidArgument(
                f"{name!r} cannot be a name on NATS: expected 1 to 64 letters, digits, '-' or '_'", name=name
            )

        def fill(subjects: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(subject.replace(NAME, name) for subject in subjects)

        return msgspec.structs.replace(
            self,
            inbox=self.inbox.replace(NAME, name),
            publish=fill(self.publish),
            subscribe=fill(self.subscribe),
        )


Policy = dict[str, Identity]
"""Identities by name: services, and the templates of executors and extensions."""


@functools.cache
def policy() -> Policy:
    """Return the policy that comes with this code."""
    return read_policy((files("hive_common.bus") / "policy.toml").read_text())


def read_policy(text: str) -> Policy:
    """Decode and check a policy.

    Raises:
        InvalidArgument: names the identity, the field, and what was expected.
    """
    try:
        found = msgspec.convert(tomllib.loads(text), type=Policy)
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidArgument(f"policy.toml: {error}", file="policy.toml") from error
    for name, identity in found.items():
        for place, subjects in (("publish", identity.publish), ("subscribe", identity.subscribe)):
            for subject in subjects:
                _check(f"policy.toml: {name}.{place}", subject)
        if f"{identity.inbox}.>" not in identity.subscribe:
            raise InvalidArgument(
                f"policy.toml: {name}.subscribe: expected {identity.inbox}.>, its own inbox", file="policy.toml"
            )
    return found


def service_inbox(service: str) -> str:
    """Return the prefix of a service's reply subjects, outside of what responders may publish to."""
    return f"_SVC.{service}"


def _check(place: str, subject: str) -> None:
    *head, last = subject.split(".")
    tokens = head if last == ">" else [*head, last]
    if not tokens or tokens[0] == "*" or not all(_TOKEN.fullmatch(token) for token in tokens):
        raise InvalidArgument(
            f"{place}: {subject!r}: expected tokens with '.' between them, the first of them no wildcard",
            file="policy.toml",
        )
