"""What judges are given and what they may answer.

    critic      {"input", "output"}                →  {"score": number}
    test        {"input", "output"}                →  {"passed": bool}
    vector      {"input", "output"}                →  {"vector": [1 to 8,192 numbers, not all zero]}
    pairs       {"input", "a", "b"}                →  {"equal": bool}
    senior      {"input", "candidates": [values]}  →  {"choice": index of the list, or null for none of them}

An answer may say more beside it, such as a reason. `input` is what the judged task was given.
"""

import math
from typing import Any, Final

import msgspec
from hive_common.contracts.events import Judging
from hive_common.contracts.judgement import JudgeKind
from hive_common.judgement.equality import Vector
from hive_common.kernel.errors import InvalidArgument

KINDS: Final[tuple[JudgeKind, ...]] = ("critic", "test", "vector", "pairs", "senior")
WORDS: Final[dict[str, str]] = {
    "critic": "score",
    "test": "passed",
    "vector": "vector",
    "pairs": "equal",
    "senior": "choice",
}
VECTOR_PARTS_MAX: Final = 8_192
"""As many shortest spellings of doubles fit into a value that is inline (`INLINE_BYTES_MAX`)."""
_EXPECTED: Final[dict[str, str]] = {
    "critic": '{"score": a number}',
    "test": '{"passed": true or false}',
    "vector": f'{{"vector": [1 to {VECTOR_PARTS_MAX} numbers, not all of them zero]}}',
    "pairs": '{"equal": true or false}',
    "senior": '{"choice": a place in the list of candidates, or null}',
}

Verdict = float | bool | int | Vector | None


def read(judging: Judging, output: bytes) -> Verdict:
    """Return what a judge said: a score, whether it passed or is equal, a vector, or the attempt chosen (0: none).

    Raises:
        InvalidArgument: the output is not what a judge of this kind may answer.
    """
    kind = judging.kind
    try:
        said = msgspec.json.decode(output)
    except (msgspec.DecodeError, RecursionError):
        raise _unexpected(kind, "text that is not JSON") from None
    if not isinstance(said, dict) or WORDS[kind] not in said:
        raise _unexpected(kind, f"nothing under `{WORDS[kind]}`")
    value = said[WORDS[kind]]
    match kind:
        case "critic" if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        case "test" | "pairs" if isinstance(value, bool):
            return value
        case "vector" if isinstance(value, list) and 1 <= len(value) <= VECTOR_PARTS_MAX:
            parts = _numbers(value)
            if parts is not None and any(parts):
                return parts
        case "senior" if value is None:
            return 0
        case "senior" if (
            not isinstance(value, bool) and isinstance(value, int) and 0 <= value < len(judging.attempts)
        ):
            return judging.attempts[value]
    raise _unexpected(kind, msgspec.json.encode(value).decode()[:80])


def question(kind: JudgeKind, given: Any, outputs: list[Any]) -> dict[str, Any]:
    """Return what a judge is given.

    Args:
        given: the input of the task whose results it judges.
        outputs: the results, in order of their attempts.
    """
    match kind:
        case "pairs":
            return {"input": given, "a": outputs[0], "b": outputs[1]}
        case "senior":
            return {"input": given, "candidates": outputs}
    return {"input": given, "output": outputs[0]}


def _numbers(value: list[Any]) -> tuple[float, ...] | None:
    """Return a list of finite numbers as such; None: it is none."""
    try:
        return msgspec.convert(value, tuple[float, ...])
    except msgspec.ValidationError:
        return None


def _unexpected(kind: str, got: str) -> InvalidArgument:
    return InvalidArgument(f"a judge ({kind}) has to answer {_EXPECTED[kind]}, and said {got}", path=WORDS[kind])
