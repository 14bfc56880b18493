"""Actions as a person sees them: nothing moves a cursor, turns text around or hides in it, nor is it too much."""

import hashlib
import re
from typing import Any, Final

import msgspec

from hive_common.permissions.actions import Action

LINE_CHARACTERS_MAX: Final = 300
LINES_MAX: Final = 80

# ECMA-48: control sequences, and strings (OSC, DCS, SOS, PM, APC) up to their end.
_ESCAPES: Final = re.compile(
    "(?:\x1b\\[|\x9b)[0-?]*[ -/]*[@-~]"
    "|(?:\x1b[\\]PX^_]|[\x90\x98\x9d-\x9f])[^\x07\x1b\x9c]*(?:\x07|\x1b\\\\|\x9c)?"
    "|\x1b[ -/]*[0-~]?"
)


def plain(text: str, characters_max: int = LINE_CHARACTERS_MAX) -> str:
    """Return text on one line without escape sequences, control and format characters, bidi marks among them.

    What is beyond the limit is told by its size and digest.
    """
    seen = "".join(one if one.isprintable() else " " if one.isspace() else "" for one in _ESCAPES.sub("", text))
    if len(seen) <= characters_max:
        return seen
    rest = seen[characters_max:].encode()
    return f"{seen[:characters_max]}… {len(rest)} more bytes, sha256 {hashlib.sha256(rest).hexdigest()}"


def lines_of(action: Action) -> tuple[str, ...]:
    """Return what an action is, in lines that can be shown."""
    lines: list[str] = []
    _tell(lines, "", msgspec.json.decode(action.text))
    if len(lines) > LINES_MAX:
        left = len(lines) - LINES_MAX
        lines[LINES_MAX:] = [f"… {left} more lines, sha256 of all {action.hash}"]
    return tuple(lines)


def _tell(lines: list[str], path: str, value: Any) -> None:
    match value:
        case dict():
            for name, inner in value.items():
                _tell(lines, f"{path}.{name}" if path else name, inner)
        case list() if all(isinstance(one, list) and len(one) == 2 for one in value):
            for name, inner in value:
                _tell(lines, f"{path}.{name}", inner)
        case list():
            for number, inner in enumerate(value):
                _tell(lines, f"{path}[{number}]", inner)
        case _:
            lines.append(f"{plain(path, 80)}: {plain(str(value))}")
