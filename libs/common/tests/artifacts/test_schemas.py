import pytest
from hive_common.artifacts.schemas import check_schema, violation
from hive_common.kernel.errors import InvalidArgument


def test_a_value_that_fits_has_no_violation() -> None:
    assert violation({"type": "object", "required": ["n"]}, {"n": 1}) is None
    assert violation({}, None) is None


def test_a_violation_names_the_place_in_the_value() -> None:
    schema = {"properties": {"numbers": {"items": {"type": "integer"}}}}
    found = violation(schema, {"numbers": [1, "two"]})
    assert found is not None
    assert found == ("numbers[1]", "'two' is not of type 'integer'")


def test_references_within_the_schema_are_followed() -> None:
    schema = {"$defs": {"n": {"type": "integer"}}, "properties": {"n": {"$ref": "#/$defs/n"}}}
    check_schema(schema, "f", "input")
    assert violation(schema, {"n": "x"}) is not None


def test_words_that_only_look_like_references_are_left_alone() -> None:
    check_schema({"const": {"$ref": "http://example.org"}}, "f", "input")


def test_a_circle_of_references_over_the_same_value_is_refused() -> None:
    schema = {"$defs": {"a": {"allOf": [{"$ref": "#/$defs/b"}]}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
    with pytest.raises(InvalidArgument, match="back to itself"):
        check_schema(schema, "f", "input")


def test_a_value_nested_beyond_what_can_be_checked_is_a_violation() -> None:
    schema = {"$defs": {"list": {"items": {"$ref": "#/$defs/list"}}}, "$ref": "#/$defs/list"}
    value: list[object] = []
    for _ in range(5000):
        value = [value]
    assert violation(schema, value) == ("", "the value is nested too deeply to be checked")


def test_a_chain_of_references_is_followed_once() -> None:
    length = 1_000
    chain: dict[str, object] = {str(n): {"$ref": f"#/$defs/{n + 1}"} for n in range(length)}
    check_schema({"$defs": chain | {str(length): {}}, "$ref": "#/$defs/0"}, "f", "input")
    with pytest.raises(InvalidArgument, match="back to itself"):
        check_schema({"$defs": chain | {str(length): {"$ref": "#/$defs/999"}}, "$ref": "#/$defs/0"}, "f", "input")
