"""Identifiers (RFC 9562): UUIDv7 for new things, UUIDv8 for ids that are derived.

A derived id is a function of what it names. Creating the same thing twice therefore meets itself in the
log at version 1, which is what makes a resubmitted job and a resumed fan-out harmless.
"""

import hashlib
import os
import re
import time
from uuid import UUID

ID_PATTERN = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}\Z")


def new_id(unix_ms: int | None = None) -> str:
    """Return a fresh UUIDv7 (RFC 9562 section 5.7) in its canonical text form.

    Args:
        unix_ms: milliseconds since the epoch; the wall clock when left out.
    """
    ms = time.time_ns() // 1_000_000 if unix_ms is None else unix_ms
    value = (ms & (1 << 48) - 1) << 80 | int.from_bytes(os.urandom(10), "big")
    return str(UUID(int=_stamp(value, version=7)))


def derive_id(*parts: str) -> str:
    """Return the UUIDv8 (RFC 9562 section 5.8) that `parts` always give.

    It is the front of SHA-256 over the parts, each preceded by its length, so that no two different lists
    of parts run together.
    """
    digest = hashlib.sha256()
    for part in parts:
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8, "big"))
        digest.update(encoded)
    return str(UUID(int=_stamp(int.from_bytes(digest.digest()[:16], "big"), version=8)))


def derive_child_id(parent: str, *parts: str) -> str:
    """Return the UUIDv8 that an id and `parts` always give, beginning with the first 48 bits of that id.

    Where ids are keys of an index, the children of one parent then lie side by side, and of a parent that is a
    UUIDv7 behind those of all earlier ones. Ids that are spread evenly would touch, and after every checkpoint
    log, a page of the index each: the larger it is, the more an insert costs.

    Args:
        parent: an id.
        parts: 74 bits of their hash, together with the parent's, follow.
    """
    return parent[:13] + derive_id(parent, *parts)[13:]


def is_id(text: str) -> bool:
    """Say whether `text` is an id in canonical form. Ids stand in subjects and paths, so nothing else may."""
    return ID_PATTERN.match(text) is not None


def _stamp(value: int, version: int) -> int:
    value = value & ~(0xF << 76) | version << 76
    return value & ~(0x3 << 62) | 0x2 << 62
