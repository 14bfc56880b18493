"""Checks against schemas that somebody made to be expensive end soon, and the others say what is wrong."""

import msgspec
import pytest
from hive_common.artifacts.schemas import check_schema
from hive_common.artifacts.validation import Validator
from hive_common.kernel.errors import InvalidArgument

NESTED = {"$defs": {"n": {"anyOf": [{"items": {"$ref": "#/$defs/n"}}] * 2}}, "$ref": "#/$defs/n", "type": "array"}
DOUBLING = {
    "$defs": {f"d{n}": {"allOf": [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(60)} | {"d60": {"minimum": 0}},
    "$ref": "#/$defs/d0",
}


def check(schema, value):
    return Validator(schema).violation(value, len(msgspec.json.encode(value)))


def nested(depth):
    value = "x"
    for _ in range(depth):
        value = [value]
    return value


@pytest.mark.parametrize("pattern", ["^(a+)+$", "^(a|a)*$", "^(.*a){20}$"])
def test_patterns_that_backtrack_for_ever_are_matched_in_linear_time(pattern):
    text = "a" * 100_000 + "!"
    assert check({"pattern": pattern}, text) is not None
    assert check({"patternProperties": {pattern: False}}, {text: 1}) is None
    assert check({"patternProperties": {pattern: True}, "additionalProperties": False}, {text: 1}) is not None


@pytest.mark.parametrize(
    ("schema", "value"),
    [
        (NESTED | {"$defs": {"n": {"anyOf": [{"items": {"$ref": "#/$defs/n"}, "minItems": 2}] * 2}}}, nested(60)),
        (DOUBLING, 1),
        ({"allOf": [{"items": {"minimum": 0}}] * 2_000}, [1] * 5_000),
        ({"items": {"enum": [str(n) for n in range(5_000)]}}, ["x"] * 1_000),
        ({"anyOf": [{"type": "null"}] * 5_000}, [list(range(100))] * 100),
        ({"unevaluatedProperties": True}, {str(n): n for n in range(10_000)}),
    ],
    ids=["recursion", "doubling references", "wide", "large enum", "large messages", "unevaluated"],
)
def test_a_schema_that_is_too_much_work_is_given_up(schema, value):
    found = check(schema, value)
    assert found == ("", "the schema is too much work to be checked for this value")


def test_elements_that_are_objects_are_told_apart_without_comparing_each_with_each():
    distinct = [{"n": [n]} for n in range(10_000)]
    assert check({"uniqueItems": True}, distinct) is None
    assert check({"uniqueItems": True}, [*distinct, {"n": [7]}]) == ("", "its elements are not unique")


@pytest.mark.parametrize(
    ("items", "unique"),
    [
        ([1, True], True),
        ([0, False], True),
        ([[1], [True]], True),
        ([{"a": 1}, {"a": True}], True),
        ([1, 1.0], False),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1.0}], False),
        (["1", 1, None, "null", [], {}], True),
        ([["array", 1], [["array", 1]]], True),
    ],
)
def test_elements_are_unique_as_json_has_it(items, unique):
    assert (check({"uniqueItems": True}, items) is None) == unique


def test_an_ordinary_schema_takes_a_large_value():
    item = {
        "type": "object",
        "required": ["id", "tags", "score"],
        "properties": {
            "id": {"type": "string", "pattern": "^[a-z]+-[0-9]+$", "maxLength": 40},
            "tags": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "uniqueItems": True},
            "score": {"type": "number", "minimum": 0, "maximum": 1},
        },
        "additionalProperties": False,
    }
    value = [{"id": f"item-{n}", "tags": ["red", "blue"], "score": 0.5} for n in range(2_000)]
    assert check({"type": "array", "items": item}, value) is None
    value[-1]["id"] = "Item"
    found = check({"type": "array", "items": item}, value)
    assert found == ("[1999].id", "'Item' does not match '^[a-z]+-[0-9]+$'")


@pytest.mark.parametrize("pattern", ["(?=a)b", r"(a)\1", "(?<!a)b", "(a{1000}){1000}"])
def test_patterns_without_a_linear_match_are_refused_when_published_and_fail_when_they_were_before(pattern):
    for schema in (
        {"properties": {"a": {"pattern": pattern}}},
        {"properties": {"a": {"patternProperties": {pattern: {}}}}},
    ):
        with pytest.raises(InvalidArgument, match="RE2"):
            check_schema(schema, "f", "input")
        found = check(schema, {"a": {"x": 1}} if "patternProperties" in str(schema) else {"a": "x"})
        assert found is not None and "RE2" in found[1]


def test_what_cannot_be_bounded_is_refused():
    schema = {"unevaluatedProperties": False, "allOf": [{"patternProperties": {"^a": {}}}]}
    with pytest.raises(InvalidArgument, match="unevaluatedProperties"):
        check_schema(schema, "f", "input")
    assert check(schema, {}) is not None
