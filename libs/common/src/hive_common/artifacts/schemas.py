"""JSON Schema (draft 2020-12) of agents' inputs and outputs: checked once, then used without a network.

A schema comes from whoever wrote the agent. References may therefore only point into the same schema: a
validator that fetched others would make the control plane call addresses that an author chose.
"""

from collections.abc import Iterator
from typing import Any

import jsonschema
import msgspec
import referencing
import referencing.exceptions
import referencing.jsonschema

from hive_common.artifacts.documents import refuse
from hive_common.artifacts.validation import BadPattern, Validator, matcher, unsupported

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_REFERENCES = ("$ref", "$dynamicRef")
_NO_NETWORK: referencing.Registry[Any] = referencing.Registry()


def check_schema(schema: dict[str, Any], file: str, path: str) -> None:
    """Check that `schema` is a schema which can be used.

    Args:
        schema: as it stands in the document.
        file: the document, for errors.
        path: where in it the schema stands, such as `input`.

    Raises:
        InvalidArgument: it is not valid draft 2020-12, names another dialect, has a pattern that is no
            regular expression of RE2, or a reference that leaves the schema, is not there, or runs in a circle.
    """
    dialect = schema.get("$schema", DIALECT)
    if str(dialect).rstrip("#") != DIALECT:
        refuse(file, f"{path}.$schema", f"the dialect {dialect!r}", DIALECT)
    try:
        jsonschema.Draft202012Validator.check_schema(
            schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
        )
    except jsonschema.SchemaError as error:
        inside = path + error.json_path.removeprefix("$")
        refuse(file, inside, f"not a JSON Schema: {_short(error.message)}", "JSON Schema draft 2020-12")
    for where, pattern in _patterns(schema, path):
        try:
            matcher(pattern)
        except BadPattern as error:
            refuse(file, where, str(error), "a regular expression without looking around or back")
    if (found := unsupported(schema)) is not None:
        refuse(file, path, found, "one of the two")
    resource = referencing.jsonschema.DRAFT202012.create_resource(schema)
    resolver = _NO_NETWORK.with_resource("", resource).resolver("")
    for where, reference in _references(schema, path):
        if not reference.startswith("#"):
            refuse(file, where, f"the reference {reference!r} leaves the schema", "one that starts with #")
        try:
            resolver.lookup(reference)
        except referencing.exceptions.Unresolvable:
            refuse(file, where, f"the reference {reference!r} points to nothing", "a place in this schema")
    _refuse_circles(schema, resolver, file, path)


def violation(schema: dict[str, Any], value: Any) -> tuple[str, str] | None:
    """Return where and how `value` breaks a checked schema, or None where it fits.

    The first element is the path in the value such as `numbers[2]`, empty for the value itself; the second
    a sentence without a full stop.
    """
    try:
        byte_count = len(msgspec.json.encode(value))
    except RecursionError:
        return "", "the value is nested too deeply to be checked"
    return Validator(schema).violation(value, byte_count)


def _short(message: str) -> str:
    return message if len(message) <= 300 else message[:297] + "…"


def _patterns(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, child in node.items():
            if key == "pattern" and isinstance(child, str):
                yield f"{path}.{key}", child
            elif key not in ("const", "enum", "default", "examples"):
                if key == "patternProperties" and isinstance(child, dict):
                    yield from ((f"{path}.{key}", pattern) for pattern in child)
                yield from _patterns(child, f"{path}.{key}")
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _patterns(child, f"{path}[{index}]")


def _references(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, dict):
        for key, child in node.items():
            if key in _REFERENCES and isinstance(child, str):
                yield f"{path}.{key}", child
            elif key not in ("const", "enum", "default", "examples"):
                yield from _references(child, f"{path}.{key}")
    elif isinstance(node, list):
        for index, child in enumerate(node):
            yield from _references(child, f"{path}[{index}]")


def _refuse_circles(schema: dict[str, Any], resolver: Any, file: str, path: str) -> None:
    """Refuse references that lead back to themselves without going down into the value.

    Every reference is followed once: a chain of them may be as long as the schema.
    """
    ended: set[str] = set()
    for where, reference in _references(schema, path):
        if reference in ended:
            continue
        # Depth first, without recursion: what is on the way from `reference` to here, each with what is left of it.
        way = {reference: _in_place(resolver.lookup(reference).contents)}
        while way:
            current, left = next(reversed(way.items()))
            following = next(left, None)
            if following is None:
                ended.add(current)
                del way[current]
            elif following in way:
                refuse(file, where, f"the reference {following!r} leads back to itself", "an end")
            elif following not in ended:
                way[following] = _in_place(resolver.lookup(following).contents)


def _in_place(node: Any) -> Iterator[str]:
    """Return the references that apply to the same value as `node` does."""
    if not isinstance(node, dict):
        return
    for key in _REFERENCES:
        if isinstance(node.get(key), str):
            yield node[key]
    for key in ("allOf", "anyOf", "oneOf"):
        for child in node.get(key, ()):
            yield from _in_place(child)
    for key in ("not", "if", "then", "else"):
        yield from _in_place(node.get(key))
