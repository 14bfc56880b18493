"""Checks of inputs and outputs against agents' schemas."""

import pytest
from hive_scheduler.domain.schemas import Check


@pytest.mark.parametrize("schema", [{}, {"title": "anything", "$comment": "at all"}])
def test_a_schema_without_constraints_takes_everything_unseen(schema: dict) -> None:
    assert Check(schema).trivial
    assert Check(schema).violation(b"[not even looked at") is None


@pytest.mark.parametrize(("raw", "fits"), [(b'  {"a": 1}', True), (b"[1]", False), (b'"{"', False), (b"1", False)])
def test_an_object_is_told_by_its_first_byte(raw: bytes, fits: bool) -> None:
    check = Check({"type": "object"})
    assert check.trivial
    assert (check.violation(raw) is None) == fits


def test_a_violation_says_where_and_what() -> None:
    check = Check({"properties": {"list": {"items": {"type": "integer"}}}})
    assert not check.trivial
    assert check.violation(b'{"list": [1, "2"]}') == "list[1]: '2' is not of type 'integer'"
    assert check.violation(b'{"list": [1, 2]}') is None


@pytest.mark.parametrize("raw", [b"", b"{", b"nan", b"[" * 100_000])
def test_what_is_not_json_is_a_violation(raw: bytes) -> None:
    assert str(Check({"minimum": 1}).violation(raw)).startswith("not JSON")
