"""What a key allows and lets see, beside a call that the gateway passes on as the bytes it is."""

from collections.abc import Iterable
from typing import Any, Final

import msgspec

from hive_common.inference.calls import PIN_ANY
from hive_common.kernel.errors import InvalidArgument

METADATA: Final = "hive-rules-bin"
"""The suffix is gRPC's, for values that are not ASCII."""


class KeyRules(msgspec.Struct, frozen=True, omit_defaults=True):
    """The rules of one key.

    Attributes:
        pin: where the data of model calls may go; a call may only narrow it.
        counts_only: keep no prompt and no completion of them.
        cloud: they may go to providers, as far as budgets let them.
        key: its name, by which budgets know it.
        only: pseudonym of the key that sees nothing but its own jobs and model calls; empty is one that sees all.
    """

    pin: str = PIN_ANY
    counts_only: bool = False
    cloud: bool = False
    key: str = ""
    only: str = ""


NO_RULES: Final = KeyRules()


def metadata_of(rules: KeyRules) -> tuple[tuple[str, bytes], ...]:
    """Return what travels with a call."""
    return () if rules == NO_RULES else ((METADATA, msgspec.json.encode(rules)),)


def rules_of(metadata: Iterable[tuple[str, Any]] | None) -> KeyRules:
    """Return the rules that came with a call. Only services can call here: without any there are none.

    Raises:
        InvalidArgument: they cannot be read.
    """
    for name, value in metadata or ():
        if name == METADATA:
            try:
                return msgspec.json.decode(value, type=KeyRules)
            except msgspec.DecodeError as error:
                raise InvalidArgument(f"{METADATA}: {error}") from error
    return NO_RULES
