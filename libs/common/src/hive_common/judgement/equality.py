"""When two results are the same.

`exact` and `json` give each result a key, and equal is who has the same one: an equivalence. `numeric`, `embedding`
and a critic say it of pairs, which need not be transitive: 1.0 and 1.4 may be equal, and 1.4 and 1.8, and 1.0 and
1.8 not. How groups are made of such pairs stands in `quorum`.

What is no JSON is equal to its own bytes only.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from operator import mul
from typing import Any, Final, NoReturn

import msgspec

from hive_common.contracts.judgement import CanonicalJson, Embedding, Equality, Exact, Numeric, Pair, PairCritic
from hive_common.contracts.values import digest_of
from hive_common.kernel.errors import InvalidArgument

DEPTH_MAX: Final = 200
"""Deeper values are compared by their bytes: far below where a parser gives up, which depends on who calls it."""

_COSINE_ROUNDING: Final = 1e-12

Vector = Sequence[float]
Comparable = Any
"""What `comparable` made of a result, to be compared many times and made once."""


class _NoJson(Exception):
    pass


def has_keys(equal: Equality) -> bool:
    """Whether a key of each result says what is equal, so that equality is transitive."""
    return isinstance(equal, Exact | CanonicalJson)


def key_of(equal: Equality, payload: bytes) -> str:
    """Return the key of a result; empty where `equal` goes by pairs.

    The key of `json` is the digest of a canonical form: members sorted, no blanks, and numbers by value. An integer
    counts with all its digits; a number with a fraction or an exponent as the double nearest to it, so that 1, 1.0
    and 1e0 are equal, and 9007199254740993 and 9007199254740992 are not (RFC 8785 would have them equal).
    """
    match equal:
        case Exact():
            return digest_of(payload)
        case CanonicalJson():
            try:
                return digest_of(_canonical(payload))
            except _NoJson:
                return "raw:" + digest_of(payload)
    return ""


def comparable(equal: Equality, payload: bytes, vector: Vector | None = None) -> Comparable:
    """Return what `alike` compares: for `numeric` the JSON, for `embedding` a vector of length one."""
    match equal:
        case Numeric():
            try:
                return (_load(payload, _integer, _finite),)
            except _NoJson:
                return None
        case Embedding():
            return None if vector is None else _unit(vector)
    return None


def alike(equal: Equality, one: Comparable, other: Comparable) -> bool:
    """Say whether two results that are not the same bytes are equal under `numeric` or `embedding`.

    Symmetric, and the same on every machine: sums are rounded once (`math.fsum`).
    """
    if one is None or other is None:
        return False
    match equal:
        case Numeric():
            return _near(one[0], other[0], equal.relative, equal.absolute)
        case Embedding():
            return len(one) == len(other) and math.fsum(map(mul, one, other)) >= equal.min - _COSINE_ROUNDING
    raise InvalidArgument(f"{type(equal).__name__} does not compare values")


def pairs_with(
    equal: Equality,
    attempt: int,
    digest: str,
    value: Comparable,
    others: Mapping[int, tuple[str, Comparable]],
) -> tuple[Pair, ...]:
    """Compare a result that came with those that were there: attempt → (digest, comparable).

    Under `critic` only what has the same bytes is known to be equal; the rest is asked.
    """
    if has_keys(equal):
        return ()
    asked = isinstance(equal, PairCritic)
    made = []
    for other, (known, form) in sorted(others.items()):
        same = known == digest
        if same or not asked:
            made.append(pair(attempt, other, same or alike(equal, value, form)))
    return tuple(made)


def pair(one: int, other: int, equal: bool) -> Pair:
    """Return what is known of two attempts, the lower first."""
    return Pair(min(one, other), max(one, other), equal)


def agreed(pairs: Iterable[Pair]) -> dict[tuple[int, int], bool]:
    """Return each pair's verdict. Where judges differ, the two are not equal."""
    known: dict[tuple[int, int], bool] = {}
    for one in pairs:
        at = (min(one.a, one.b), max(one.a, one.b))
        known[at] = known.get(at, True) and one.equal
    return known


# --- JSON --------------------------------------------------------------------------------------------------


def _load(payload: bytes, integer: Any, real: Any) -> Any:
    try:
        value = json.loads(
            payload.decode(),
            parse_int=integer,
            parse_float=real,
            parse_constant=_no_constant,
            object_pairs_hook=_members,
        )
    except (ValueError, RecursionError) as error:
        raise _NoJson from error
    _check_depth(value)
    return value


def _canonical(payload: bytes) -> bytes:
    value = _load(payload, _raw_integer, _raw_real)
    try:
        return msgspec.json.encode(value, order="sorted")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which is no text
        raise _NoJson from error


def _members(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members = dict(pairs)
    if len(members) != len(pairs):
        raise _NoJson
    return members


def _no_constant(text: str) -> NoReturn:
    raise _NoJson


def _check_depth(value: Any) -> None:
    level, depth = [value], 0
    while level:
        depth += 1
        if depth > DEPTH_MAX:
            raise _NoJson
        below: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                below += one.values()
            elif isinstance(one, list):
                below += one
        level = [one for one in below if isinstance(one, dict | list)]


def _raw_integer(text: str) -> msgspec.Raw:
    return msgspec.Raw(b"0" if text == "-0" else text.encode())


def _raw_real(text: str) -> msgspec.Raw:
    number = _finite(text)
    return msgspec.Raw((str(int(number)) if number.is_integer() else repr(number)).encode())


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise _NoJson
    return number


def _integer(text: str) -> int | float:
    # Beyond a double nothing is near; and Python turns no text of thousands of digits into a number.
    return _finite(text) if len(text) > 18 else int(text)


def _near(one: Any, other: Any, relative: float, absolute: float) -> bool:
    """Compare without recursion: results are as deep as their executor wants."""
    todo = [(one, other)]
    while todo:
        a, b = todo.pop()
        if isinstance(a, dict) and isinstance(b, dict):
            if a.keys() != b.keys():
                return False
            todo += [(a[name], b[name]) for name in a]
        elif isinstance(a, list) and isinstance(b, list):
            if len(a) != len(b):
                return False
            todo += zip(a, b, strict=True)
        elif _is_number(a) and _is_number(b):
            if not math.isclose(a, b, rel_tol=relative, abs_tol=absolute):
                return False
        elif type(a) is not type(b) or a != b:
            return False
    return True


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# --- vectors -----------------------------------------------------------------------------------------------


def _unit(vector: Vector) -> tuple[float, ...] | None:
    """Scale to length one, by the greatest part first so that nothing overflows. None: it has no direction."""
    greatest = max(map(abs, vector), default=0.0)
    if not 0.0 < greatest < math.inf or any(map(math.isnan, vector)):
        return None
    scaled = [part / greatest for part in vector]
    length = math.sqrt(math.fsum(map(mul, scaled, scaled)))
    return tuple(part / length for part in scaled)
