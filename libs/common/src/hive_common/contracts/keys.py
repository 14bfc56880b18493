"""API keys: their names, and how their secrets look."""

import re
from typing import Final

SECRET_PREFIX: Final = "hive_"  # noqa: S105 - what all of them begin with
"""So that scanners for leaked secrets, and people, see what it is. What looks otherwise is looked up nowhere."""

KEY_NAME_EXPECTED: Final = "1 to 63 small letters, digits, `.`, `_` and `-`"
_NAME: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")


def is_key_name(text: str) -> bool:
    """Say whether a key may have this name."""
    return _NAME.match(text) is not None
