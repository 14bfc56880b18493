"""Names of kept values (the permission `kv`), and what their bytes count."""

import re
from typing import Final

import msgspec

from hive_common.contracts.events import KvWrite
from hive_common.contracts.limits import KV_KEY_CHARACTERS_MAX

_NAMESPACE: Final = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}\Z")
_PREFIX: Final = re.compile(rf"[A-Za-z0-9._/:@=-]{{0,{KV_KEY_CHARACTERS_MAX}}}\Z")


def is_namespace(text: str) -> bool:
    """Say whether manifests can name a namespace so."""
    return _NAMESPACE.match(text) is not None


def is_key(text: str) -> bool:
    """Say whether a value can be kept under this name."""
    return text != "" and is_prefix(text)


def is_prefix(text: str) -> bool:
    """Say whether names of values can begin so."""
    return _PREFIX.match(text) is not None


def size_of(write: KvWrite) -> int:
    """Return what a write leaves behind: the bytes of key and value, none where it deletes."""
    return 0 if isinstance(write.value, msgspec.UnsetType) else len(write.key) + memoryview(write.value).nbytes
