"""Order of agent versions (Semantic Versioning 2.0.0, section 11)."""

from hive_common.artifacts.names import VERSION_PATTERN
from hive_common.kernel.errors import InvalidArgument


def sort_key(version: str) -> str:
    """Return ASCII text that sorts bytewise as `version` does by precedence.

    Build metadata has no precedence; versions that differ in it alone have the same key.

    Raises:
        InvalidArgument: not a semantic version.
    """
    if not VERSION_PATTERN.match(version):
        raise InvalidArgument(f"{version!r} is not a semantic version; expected such as 1.0.0")
    core, _, pre_release = version.partition("+")[0].partition("-")
    numbers = ".".join(part.zfill(9) for part in core.split("."))
    if not pre_release:
        # A release comes after its pre-releases: `~` is the last printable character.
        return numbers + "~"
    # `!` is below every character of an identifier, so that a shorter list comes first.
    return numbers + "-" + "!".join(_identifier_key(part) for part in pre_release.split("."))


def _identifier_key(identifier: str) -> str:
    """Numbers come before words and compare by value: their length in front of them does that."""
    return f"0{len(identifier):03}{identifier}" if identifier.isdigit() else f"1{identifier}"
