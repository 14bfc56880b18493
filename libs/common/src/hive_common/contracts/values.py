"""A JSON value in a message or event: inline while it is small, by digest once it is not."""

import hashlib
import re
from typing import Any

import msgspec

from hive_common.contracts.limits import INLINE_BYTES_MAX

DIGEST_PATTERN = re.compile(r"sha256:[0-9a-f]{64}\Z")


class Value(msgspec.Struct, frozen=True, omit_defaults=True):
    """Exactly one of `inline` (raw JSON bytes, never re-serialised) and `digest` (of the JSON bytes) is set."""

    inline: msgspec.Raw | msgspec.UnsetType = msgspec.UNSET
    digest: str | None = None
    size_bytes: int = 0

    @property
    def raw(self) -> bytes | None:
        """The JSON bytes where they are inline, else None."""
        return None if isinstance(self.inline, msgspec.UnsetType) else bytes(self.inline)


def inline_bytes(value: Value | None) -> int:
    """Return how many bytes ride with a value: none where it is named by its digest, or there is no value."""
    if value is None or isinstance(value.inline, msgspec.UnsetType):
        return 0
    # Not `size_bytes`, which is what others say about it.
    return memoryview(value.inline).nbytes


def digest_of(data: bytes) -> str:
    """Return `sha256:<hex>`, the OCI digest of `data`."""
    return "sha256:" + hashlib.sha256(data).hexdigest()


def is_digest(text: str) -> bool:
    """Say whether `text` is a SHA-256 digest in OCI form."""
    return DIGEST_PATTERN.match(text) is not None


def inline(data: bytes) -> Value:
    """Wrap JSON bytes as an inline value, whatever their size; the caller has checked `fits_inline`."""
    return Value(inline=msgspec.Raw(data), size_bytes=len(data))


def by_digest(data: bytes) -> Value:
    """Name JSON bytes by their digest; the caller has stored them as a blob."""
    return Value(digest=digest_of(data), size_bytes=len(data))


def fits_inline(data: bytes) -> bool:
    """Say whether `data` may ride in messages and events."""
    return len(data) <= INLINE_BYTES_MAX


def encode_json(value: Any) -> bytes:
    """Return the JSON bytes of a plain value (dict, list, str, int, float, bool, None)."""
    return msgspec.json.encode(value)
