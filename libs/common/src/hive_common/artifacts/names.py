"""How agents and their versions are named."""

import re
from typing import Final

NAME_PATTERN: Final = re.compile(r"[a-z][a-z0-9-]{0,62}\Z")
VERSION_CHARACTERS_MAX: Final = 128

# Semantic Versioning 2.0.0, section 2 to 10.
VERSION_PATTERN: Final = re.compile(
    r"(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})\.(0|[1-9]\d{0,8})"
    r"(-(0|[1-9]\d*|\d*[A-Za-z-][0-9A-Za-z-]*)(\.(0|[1-9]\d*|\d*[A-Za-z-][0-9A-Za-z-]*))*)?"
    r"(\+[0-9A-Za-z-]+(\.[0-9A-Za-z-]+)*)?\Z",
    re.ASCII,
)


def is_name(text: str) -> bool:
    """Say whether an agent may be called so."""
    return NAME_PATTERN.match(text) is not None


def is_version(text: str) -> bool:
    """Say whether a version of an agent may be called so."""
    return len(text) <= VERSION_CHARACTERS_MAX and VERSION_PATTERN.match(text) is not None
