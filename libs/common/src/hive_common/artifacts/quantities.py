"""Sizes and durations as people write them in manifests and job files: `64Mi`, `10s`."""

import re
from typing import Any, Final

from hive_common.artifacts.documents import refuse

_QUANTITY = re.compile(r"(?P<number>[0-9]{1,18})(?P<unit>[A-Za-z]*)\Z")
_BYTES: Final = {
    "": 1,
    "k": 1000,
    "M": 1000**2,
    "G": 1000**3,
    "T": 1000**4,
    "Ki": 1024,
    "Mi": 1024**2,
    "Gi": 1024**3,
    "Ti": 1024**4,
}
_MILLISECONDS: Final = {"ms": 1, "s": 1000, "m": 60_000, "h": 3_600_000, "d": 86_400_000}


def parse_quantity(value: Any, *, file: str = "", path: str = "") -> int:
    """Return a size in bytes.

    Args:
        value: a plain integer, or text with a unit as in Kubernetes (`512Ki`, `64Mi`, `1Gi`, `5M`).
        file: where it was read, for errors.
        path: where in that file.

    Raises:
        InvalidArgument: neither of the two, or negative.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    found = _QUANTITY.match(value) if isinstance(value, str) else None
    if found is None or found["unit"] not in _BYTES:
        refuse(file, path, f"{value!r} is not a size", "bytes, or a number with Ki, Mi or Gi such as 64Mi")
    return int(found["number"]) * _BYTES[found["unit"]]


def parse_duration(value: Any, *, file: str = "", path: str = "") -> int:
    """Return a duration in milliseconds.

    Args:
        value: text with a unit: `500ms`, `10s`, `2m`, `1h`, `1d`. A bare number says too little.
        file: where it was read, for errors.
        path: where in that file.

    Raises:
        InvalidArgument: anything else.
    """
    found = _QUANTITY.match(value) if isinstance(value, str) else None
    if found is None or found["unit"] not in _MILLISECONDS:
        refuse(file, path, f"{value!r} is not a duration", "a number with ms, s, m, h or d such as 10s")
    return int(found["number"]) * _MILLISECONDS[found["unit"]]
