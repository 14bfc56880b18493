"""Fingerprints of failures: those that fail in the same way have the same one, whatever they failed on.

Of a message stays what is always there. What differs from one time to the next (numbers, ids, digests, addresses,
paths, what stands in quotes) becomes a word for its kind. Types stand in quotes, too, and do not differ: Python's
`'str' object`, and `of type 'string'` as schemas say it.
"""

import re
from hashlib import sha256
from typing import Final

READ_CHARACTERS_MAX: Final = 4_000
"""What is looked at of a message; agents write as much as they like."""
SHOWN_CHARACTERS_MAX: Final = 300
FINGERPRINT_CHARACTERS: Final = 16

_TYPE: Final = "int|float|bool|str|bytes|bytearray|memoryview|list|tuple|dict|set|frozenset|NoneType"
_QUOTED_TYPE: Final = rf"""
    (?P<mark>['"`])
    (?: (?:{_TYPE}) (?:\ \|\ (?:{_TYPE}|null))*
      | (?<=of\ type\ .) [a-z]{{1,40}}
      | [a-z_][a-z_.]{{0,80}} (?=(?P=mark)\ objects?\b)
    )
    (?P=mark)
"""
"""A name in quotes that is one of a type, wherever it stands, or where a type is spoken of."""
_KINDS: Final = (
    # In quotes, but no apostrophe within a word.
    ("value", r"""(?<!\w)'[^'\n]*'(?!\w)|"[^"\n]*"|`[^`\n]*`"""),
    ("address", r"\b[a-z][a-z0-9+.-]{0,20}://[^\s<>]+"),
    ("address", r"\b[\w.+-]{1,64}@[\w-]+(?:\.[\w-]+)+"),
    ("digest", r"\bsha(?:1|256|512):[0-9a-f]+\b"),
    ("id", r"\b[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"),
    ("address", r"\b0x[0-9a-f]+\b"),
    ("address", r"\b\d{1,3}(?:\.\d{1,3}){3}(?::\d+)?\b"),
    ("address", r"\b[0-9a-f]{1,4}(?::[0-9a-f]{0,4}){3,7}\b|\[(?=[0-9a-f]*:[0-9a-f]*:)[0-9a-f:]+\](?::\d+)?"),
    # As git and others cut digests: only with a digit and a letter, for there are words of these letters.
    ("digest", r"\b(?=[0-9a-f]*\d)(?=[0-9a-f]*[a-f])[0-9a-f]{7,}\b"),
    ("path", r"\b[a-z]:\\[^\s<>\"']+"),
    ("path", r"(?<![\w<>/])(?:~|\.{1,2})?(?:/[\w.@+%=-]+)+/?"),
    ("n", r"\d+(?:[._,:]\d+)*(?:e[+-]?\d+)?"),
)
_NAMES: Final = {f"k{number}": name for number, (name, _) in enumerate(_KINDS)}
_VARYING: Final = re.compile(
    f"(?P<type>(?<!\\w)(?x:{_QUOTED_TYPE})(?!\\w))|"
    + "|".join(f"(?P<k{number}>{pattern})" for number, (_, pattern) in enumerate(_KINDS)),
    re.IGNORECASE,
)
_BLANKS: Final = re.compile(r"[\s\x00-\x1f\x7f-\x9f]+")


def normalised(message: str) -> str:
    """Return what of a message is the same each time, `SHOWN_CHARACTERS_MAX` characters at most."""
    text = _VARYING.sub(_word_for, message[:READ_CHARACTERS_MAX])
    return _BLANKS.sub(" ", text).strip()[:SHOWN_CHARACTERS_MAX]


def _word_for(match: re.Match[str]) -> str:
    name = _NAMES.get(match.lastgroup or "")
    return match.group() if name is None else f"<{name}>"


def fingerprint_of(agent: str, code: str, message: str) -> str:
    """Return the fingerprint of a failure, in hexadecimal.

    Args:
        agent: its name, with its version or without, which does not count.
        code: of the failure.
        message: as it was reported.
    """
    parts = [part.encode(errors="replace") for part in (agent.partition("@")[0], code, normalised(message))]
    joined = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return sha256(joined).hexdigest()[:FINGERPRINT_CHARACTERS]
