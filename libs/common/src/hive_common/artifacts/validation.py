"""Checks values against JSON Schemas (draft 2020-12) within a bound of work.

Neither the schema nor the value is trusted: an author writes one, a guest or a caller gives the other. Regular
expressions are therefore matched by RE2, in linear time; uniqueness is told by hashes; and every keyword that is
applied counts against a budget that grows with the value. A check that would need more gives up and says so.
"""

from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final, cast

import jsonschema
import referencing
from jsonschema import validators

STEPS_MIN: Final = 20_000
STEPS_PER_BYTE: Final = 8
STEPS_MAX: Final = 8_000_000
"""A step takes about a microsecond. A schema that looks at every element with a dozen keywords stays below."""
ELEMENTS_PER_STEP: Final = 16
"""Elements of an enum that are compared with, or of a value that goes into a message, in the time of a step."""
CHARACTERS_PER_STEP: Final = 256
"""Of a text that is matched or shown."""
PATTERNS_CACHED: Final = 128
PATTERN_BYTES_MAX: Final = 1024 * 1024
"""What one compiled pattern may take in memory; RE2 refuses those that would need more."""
MESSAGE_CHARACTERS_MAX: Final = 300

_NO_NETWORK: Final[referencing.Registry[Any]] = referencing.Registry()
_Errors = Iterator[jsonschema.ValidationError]
_Keyword = Callable[[Any, Any, Any, Mapping[str, Any]], _Errors | None]


class _TooMuch(Exception):
    """The budget is used up."""


class _Budget:
    __slots__ = ("_left", "_sizes")

    def __init__(self, steps: int) -> None:
        self._left = steps
        self._sizes: dict[int, int] = {}

    def spend(self, steps: int) -> None:
        self._left -= steps
        if self._left < 0:
            raise _TooMuch

    def size(self, value: Any) -> int:
        """Return how many values there are in a value; each list and object is counted once."""
        if isinstance(value, str):
            return 1 + len(value) // ELEMENTS_PER_STEP
        if not isinstance(value, list | dict):
            return 1
        found = self._sizes.get(id(value))
        if found is None:
            below = value.values() if isinstance(value, dict) else value
            found = self._sizes[id(value)] = 1 + sum(map(self.size, below))
        return found


class BadPattern(ValueError):
    """A regular expression that RE2 does not take; the message says why."""


_budget: ContextVar[_Budget] = ContextVar("budget")


class Validator:
    """One compiled schema, for any thread.

    Args:
        schema: without references to elsewhere.

    It MUST be a schema (`hive_common.artifacts.schemas.check_schema`).
    """

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self._validator = _Bounded(schema, registry=_NO_NETWORK)
        self._unsupported = unsupported(schema)

    def violation(self, value: Any, byte_count: int) -> tuple[str, str] | None:
        """Return where and how `value` breaks the schema, or None where it fits.

        Args:
            value: plain JSON.
            byte_count: of its JSON text; the budget grows with it.
        """
        if self._unsupported is not None:
            return "", f"the schema cannot be checked: {self._unsupported}"
        token = _budget.set(_Budget(min(STEPS_MIN + STEPS_PER_BYTE * byte_count, STEPS_MAX)))
        try:
            worst = jsonschema.exceptions.best_match(self._validator.iter_errors(value))
        except RecursionError:
            return "", "the value is nested too deeply to be checked"
        except _TooMuch:
            return "", "the schema is too much work to be checked for this value"
        except BadPattern as error:
            return "", f"the schema cannot be checked: {error}"
        finally:
            _budget.reset(token)
        if worst is None:
            return None
        message = worst.message
        if len(message) > MESSAGE_CHARACTERS_MAX:
            message = message[: MESSAGE_CHARACTERS_MAX - 1] + "…"
        return worst.json_path.removeprefix("$").lstrip("."), message


def unsupported(schema: Mapping[str, Any]) -> str | None:
    """Return what in a schema has no bounded check, or None: `unevaluatedProperties` beside `patternProperties`
    matches patterns in ways of its own."""
    words = set(_keywords(schema))
    if {"unevaluatedProperties", "patternProperties"} <= words:
        return "it has both unevaluatedProperties and patternProperties"
    return None


def _keywords(node: Any) -> Iterator[str]:
    if isinstance(node, Mapping):
        yield from node
        for below in node.values():
            yield from _keywords(below)
    elif isinstance(node, list):
        for below in node:
            yield from _keywords(below)


@lru_cache(PATTERNS_CACHED)
def matcher(pattern: str) -> Callable[[str], object]:
    """Return a function that looks for a pattern in a text, in linear time.

    Raises:
        BadPattern: RE2 does not take it: it is malformed, too large, or looks around or back.
    """
    # Imported where it is needed: most schemas have no pattern, and most processes no schema.
    import re2  # type: ignore[import-untyped]

    options = re2.Options()
    options.log_errors = False
    options.max_mem = PATTERN_BYTES_MAX
    try:
        return cast("Callable[[str], object]", re2.compile(pattern, options).search)
    except re2.error as error:
        raise BadPattern(f"the pattern {pattern[:80]!r} is none that RE2 takes: {_text(error)}") from error


def _text(error: Exception) -> str:
    said = error.args[0] if error.args else error
    return said.decode(errors="replace") if isinstance(said, bytes) else str(said)


def _counted(keyword: _Keyword) -> _Keyword:
    def apply(validator: Any, wanted: Any, instance: Any, schema: Mapping[str, Any]) -> _Errors:
        budget = _budget.get()
        budget.spend(1 + _elements(instance) + _elements(wanted) // ELEMENTS_PER_STEP)
        for error in keyword(validator, wanted, instance, schema) or ():
            # Its message shows the value, however large.
            budget.spend(budget.size(instance) // ELEMENTS_PER_STEP)
            yield error

    return apply


def _elements(value: Any) -> int:
    return len(value) if isinstance(value, list | dict) else 0


def _pattern(validator: Any, wanted: str, instance: Any, schema: Mapping[str, Any]) -> _Errors:
    if not isinstance(instance, str):
        return
    _budget.get().spend(len(instance) // CHARACTERS_PER_STEP)
    if not matcher(wanted)(instance):
        yield jsonschema.ValidationError(f"{instance!r} does not match {wanted!r}")


def _pattern_properties(
    validator: Any, wanted: Mapping[str, Any], instance: Any, schema: Mapping[str, Any]
) -> _Errors:
    if not isinstance(instance, dict):
        return
    for pattern, below in wanted.items():
        search = matcher(pattern)
        _budget.get().spend(len(instance))
        for name, value in instance.items():
            if search(name):
                yield from validator.descend(value, below, path=name, schema_path=pattern)


def _additional_properties(validator: Any, wanted: Any, instance: Any, schema: Mapping[str, Any]) -> _Errors:
    if not isinstance(instance, dict):
        return
    named = schema.get("properties", {})
    searches = [matcher(pattern) for pattern in schema.get("patternProperties", {})]
    _budget.get().spend(len(instance) * len(searches))
    extras = [name for name in instance if name not in named and not any(search(name) for search in searches)]
    if wanted is False and extras:
        shown = ", ".join(map(repr, extras[:5]))
        yield jsonschema.ValidationError(f"additional properties are not allowed: {shown}")
    elif isinstance(wanted, dict):
        for name in extras:
            yield from validator.descend(instance[name], wanted, path=name)


def _unique_items(validator: Any, wanted: bool, instance: Any, schema: Mapping[str, Any]) -> _Errors:
    if wanted and isinstance(instance, list) and len({_hashable(item) for item in instance}) < len(instance):
        yield jsonschema.ValidationError("its elements are not unique")


def _hashable(value: Any) -> Any:
    """Return something that is equal where JSON values are: 1 and 1.0 are, 1 and true are not."""
    match value:
        case bool():
            return "boolean", value
        case list():
            return "array", tuple(map(_hashable, value))
        case dict():
            return "object", frozenset((name, _hashable(below)) for name, below in value.items())
    return value


def _unevaluated_properties(
    validator: Any, wanted: Any, instance: Any, schema: Mapping[str, Any]
) -> _Errors | None:
    # It looks for each of them in a list of the others.
    _budget.get().spend(_elements(instance) ** 2 // 64)
    return cast("_Errors | None", _PLAIN["unevaluatedProperties"](validator, wanted, instance, schema))


_PLAIN: Final[Mapping[str, Any]] = jsonschema.Draft202012Validator.VALIDATORS
_Bounded: Final[Any] = validators.extend(  # type: ignore[no-untyped-call]
    jsonschema.Draft202012Validator,
    {
        name: _counted(keyword)
        for name, keyword in {
            **_PLAIN,
            "pattern": _pattern,
            "patternProperties": _pattern_properties,
            "additionalProperties": _additional_properties,
            "uniqueItems": _unique_items,
            "unevaluatedProperties": _unevaluated_properties,
        }.items()
    },
)
