"""YAML that people write: agent manifests and job files, read strictly and with errors that say where.

Only what JSON can say gets through. Aliases are refused, because a few bytes of them can name gigabytes;
a key that stands twice is refused, because one of the two would be lost without a word.
"""

import difflib
import math
import re
from collections.abc import Iterable
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import msgspec

from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge

_AT = re.compile(r" - at `\$(?P<path>[^`]*)`\Z")
_UNKNOWN = re.compile(r"Object contains unknown field `(?P<field>.*)`\Z", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(?P<field>.*)`\Z", re.DOTALL)
_NOT_ONE_OF = re.compile(r"Invalid enum value (?P<value>.*)\Z", re.DOTALL)
_TYPE = re.compile(r"`(?P<types>[a-z]+(?: \| [a-z]+)*)`")
_TYPES = {
    "str": "text",
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
}

T = TypeVar("T", bound=msgspec.Struct)


def refuse(file: str, path: str, problem: str, expected: str = "") -> NoReturn:
    """Raise the `InvalidArgument` that every error in a document has: file, path inside, what was expected.

    Args:
        file: the document, as its author knows it.
        path: where in it, such as `resources.memory`; empty for the document as a whole.
        problem: what is wrong, without a full stop.
        expected: what would be right.
    """
    where = ": ".join(part for part in (file, path) if part)
    message = (f"{where}: " if where else "") + problem + (f"; expected {expected}" if expected else "")
    raise InvalidArgument(message, file=file, path=path, expected=expected)


def load_yaml(data: bytes, file: str, *, bytes_max: int) -> dict[str, Any]:
    """Read a YAML document whose top is a mapping, into what JSON can say.

    Args:
        data: the file's bytes, UTF-8.
        file: its name, for errors.
        bytes_max: the largest document that is read at all.

    Raises:
        PayloadTooLarge: more than `bytes_max`.
        InvalidArgument: not YAML, not UTF-8, or one of the things this module refuses, with line and column.
    """
    if len(data) > bytes_max:
        raise PayloadTooLarge(
            f"{file}: has {len(data)} bytes; expected at most {bytes_max}", file=file, limit=bytes_max
        )
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        refuse(file, "", f"byte {error.start} is not UTF-8", "a YAML document in UTF-8")
    # A twentieth of a second, and most processes read no document.
    from hive_common.artifacts.strict_yaml import parse

    document = parse(text, file)
    if not isinstance(document, dict):
        refuse(file, "", "is not a mapping", "a YAML document of `key: value` lines")
    _require_json(document, file, "")
    return document


def _require_json(value: Any, file: str, path: str) -> None:
    if isinstance(value, dict):
        for key, child in value.items():
            _require_json(child, file, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for index, child in enumerate(value):
            _require_json(child, file, f"{path}[{index}]")
    elif isinstance(value, float) and not math.isfinite(value):
        refuse(file, path, f"{value} is no JSON number", "a finite number")
    elif isinstance(value, int) and not isinstance(value, bool) and not -(2**63) <= value < 2**64:
        refuse(file, path, "the integer is too large", "at most 64 bits")
    elif not isinstance(value, (str, int, float, bool, type(None))):
        refuse(file, path, f"a value of type {type(value).__name__}", "what JSON can say")


def convert(document: dict[str, Any], kind: type[T], file: str) -> T:
    """Return a document as a struct.

    Args:
        document: as `load_yaml` returned it.
        kind: a frozen struct with `forbid_unknown_fields`.
        file: its name, for errors.

    Raises:
        InvalidArgument: a field is missing, unknown (the nearest known one is named) or of another type.
    """
    try:
        return msgspec.convert(document, kind)
    except msgspec.ValidationError as error:
        refuse_validation(error, file, kind)


def refuse_validation(
    error: msgspec.ValidationError, file: str, kind: type[msgspec.Struct], below: str = ""
) -> NoReturn:
    """Raise the `InvalidArgument` for what msgspec found while it read a `kind`.

    Args:
        below: the path in the document at which the `kind` stands.
    """
    text = str(error)
    found = _AT.search(text)
    path = found["path"].lstrip(".") if found else ""
    where = ".".join(filter(None, (below, path)))
    problem = text[: found.start()] if found else text
    if unknown := _UNKNOWN.match(problem):
        known = _fields_at(kind, path)
        inside = f"{where}.{unknown['field']}" if where else unknown["field"]
        close = nearest(unknown["field"], known)
        expected = f"`{close}`" if close else "one of " + ", ".join(sorted(known))
        refuse(file, inside, "unknown field", expected)
    if missing := _MISSING.match(problem):
        refuse(file, where, f"the field `{missing['field']}` is missing", f"`{missing['field']}: …`")
    if wrong := _NOT_ONE_OF.match(problem):
        refuse(file, where, f"got {wrong['value']}", _choices_at(kind, path))
    wanted, _, got = problem.partition(", got ")
    if got and wanted.startswith("Expected "):
        hint = " (put it in quotes)" if "`str`" in wanted and got in ("`float`", "`int`", "`bool`") else ""
        refuse(file, where, f"got {_in_words(got)}", _in_words(wanted.removeprefix("Expected ")) + hint)
    refuse(file, where, problem)


def _in_words(said: str) -> str:
    """Return what msgspec says of types in the words of who writes documents."""

    def words(match: re.Match[str]) -> str:
        types = [one for one in match["types"].split(" | ") if one != "null"] or ["null"]
        return " or ".join(_TYPES.get(one, one) for one in types)

    return _TYPE.sub(words, said)


def nearest(wrong: str, known: Iterable[str]) -> str | None:
    """Return the known name that looks most like `wrong`, or None where none does."""
    close = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return close[0] if close else None


def _fields_at(kind: type[msgspec.Struct], path: str) -> list[str]:
    """Return the names that the struct at `path` below `kind` knows, as they stand in documents."""
    found = _struct_at(kind, path)
    return [] if found is None else [field.encode_name for field in msgspec.structs.fields(found)]


def _choices_at(kind: type[msgspec.Struct], path: str) -> str:
    """Return what the field at `path` below `kind` may be, in words; empty where that is not known."""
    parent, _, name = path.rpartition(".")
    found = _struct_at(kind, parent)
    for field in () if found is None else msgspec.structs.fields(found):
        if field.encode_name == name:
            choices = [str(choice) for choice in _literals_in(field.type)]
            inside = _struct_in(field.type)
            choices += [f"{{{one.encode_name}: …}}" for one in msgspec.structs.fields(inside)] if inside else []
            return "one of " + ", ".join(choices) if choices else ""
    return ""


def _literals_in(annotation: Any) -> list[Any]:
    if get_origin(annotation) is Literal:
        return list(get_args(annotation))
    return [choice for argument in get_args(annotation) for choice in _literals_in(argument)]


def _struct_at(kind: type[msgspec.Struct], path: str) -> Any:
    current: Any = kind
    for part in filter(None, re.sub(r"\[[^\]]*\]", "", path).split(".")):
        for field in msgspec.structs.fields(current):
            if field.encode_name == part:
                current = _struct_in(field.type)
        if current is None:
            return None
    return current


def _struct_in(annotation: Any) -> Any:
    if isinstance(annotation, type) and issubclass(annotation, msgspec.Struct):
        return annotation
    for argument in getattr(annotation, "__args__", ()):
        found = _struct_in(argument)
        if found is not None:
            return found
    return None
