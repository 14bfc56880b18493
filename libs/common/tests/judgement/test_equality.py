"""What is equal: canonical JSON is an equivalence, numbers and vectors go by pairs, and nothing raises."""

import json
import math
from random import Random
from typing import Any

import pytest
from hive_common.contracts.judgement import CanonicalJson, Embedding, Exact, Numeric, Pair, PairCritic
from hive_common.judgement.equality import DEPTH_MAX, agreed, alike, comparable, key_of, pairs_with
from hypothesis import given, settings
from hypothesis import strategies as st

deterministic = settings(derandomize=True)
leaves = (
    st.none()
    | st.booleans()
    | st.integers(-(10**25), 10**25)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
values = st.recursive(
    leaves, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=12
)


def json_key(text: str | bytes) -> str:
    return key_of(CanonicalJson(), text.encode() if isinstance(text, str) else text)


def near(one: str, other: str, absolute: float = 0.0, relative: float = 0.0) -> bool:
    rule = Numeric(absolute, relative)
    return alike(rule, comparable(rule, one.encode()), comparable(rule, other.encode()))


def shuffled(value: Any, random: Random) -> Any:
    if isinstance(value, dict):
        members = list(value.items())
        random.shuffle(members)
        return {name: shuffled(member, random) for name, member in members}
    return [shuffled(member, random) for member in value] if isinstance(value, list) else value


@deterministic
@given(values, st.randoms(use_true_random=False), st.booleans(), st.sampled_from([None, 1, "\t"]))
def test_json_is_equal_however_it_is_written(value: Any, random: Random, escape: bool, indent: Any) -> None:
    try:
        written = json.dumps(shuffled(value, random), ensure_ascii=escape, indent=indent).encode()
        plain = json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return
    assert json_key(written) == json_key(plain)


@deterministic
@given(values, values)
def test_json_of_other_values_is_not_equal(one: Any, other: Any) -> None:
    first, second = json.dumps(one), json.dumps(other)
    if json.loads(first) != json.loads(second):
        assert json_key(first) != json_key(second)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1", "1.0"),
        ("1", "1e0"),
        ("100", "1E2"),
        ("0", "-0"),
        ("0", "-0.0"),
        ("0.1", "0.10"),
        ("1e20", "100000000000000000000"),
        ('{"a":1,"b":2}', '{ "b":2.0,"a":1}'),
    ],
)
def test_numbers_are_equal_by_value(one: str, other: str) -> None:
    assert json_key(one) == json_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("9007199254740993", "9007199254740992"),
        ("1e20", "100000000000000000001"),
        ("1", '"1"'),
        ("1", "true"),
        ("0", "false"),
        ("null", "0"),
        ("[1,2]", "[2,1]"),
        ("[]", "{}"),
        ("1e999", "1e998"),  # no doubles: equal to their own bytes only
        ("1e999", "1e999 "),
        ('{"a":1,"a":2}', '{"a":2}'),
        ("NaN", " NaN"),
        ('"\\ud800"', '"\\ud800" '),
        ("\ufeff1", "1"),
    ],
)
def test_what_is_not_the_same_value_is_not_equal(one: str, other: str) -> None:
    assert json_key(one) != json_key(other)


@deterministic
@given(st.binary(max_size=40), st.binary(max_size=40))
def test_any_bytes_have_a_key_and_a_form(one: bytes, other: bytes) -> None:
    assert (json_key(one) == json_key(other)) or one != other
    assert (key_of(Exact(), one) == key_of(Exact(), other)) == (one == other)
    rule = Numeric(1.0)
    alike(rule, comparable(rule, one), comparable(rule, other))


def test_a_result_may_be_as_deep_as_it_wants() -> None:
    for depth in (DEPTH_MAX - 1, DEPTH_MAX + 1, 1_000, 200_000):
        text = "[" * depth + "1" + "]" * depth
        assert (json_key(text) == json_key(" " + text)) == (depth < DEPTH_MAX)
        assert near(text, text.replace("1", "1.5"), 1.0) == (depth < DEPTH_MAX)


def test_numbers_are_near_within_the_greater_of_both_tolerances() -> None:
    assert near("1.0", "1.1", absolute=0.11) and not near("1.0", "1.1", absolute=0.09)
    assert near("1000", "1009", relative=0.01) and not near("1000", "1011", relative=0.01)
    assert near("0", "0.001", absolute=0.01, relative=0.01)
    assert near('{"a":[1,"x",true,null]}', '{"a":[1.05,"x",true,null]}', absolute=0.1)
    for other in ('{"a":[1,"y"]}', '{"a":[1]}', '{"b":[1,"x"]}', '["a"]', "1", '{"a":[true,"x"]}', "no JSON"):
        assert not near('{"a":[1,"x"]}', other, absolute=10.0)
    assert not near("true", "1", absolute=10.0)
    assert near("1" * 30, "1" * 29 + "2", relative=1e-9)


@deterministic
@given(values, values, st.floats(0, 10), st.floats(0, 0.99))
def test_nearness_is_symmetric_and_reflexive(one: Any, other: Any, absolute: float, relative: float) -> None:
    a, b = json.dumps(one), json.dumps(other)
    assert near(a, b, absolute, relative) == near(b, a, absolute, relative)
    big = any(token in a for token in ("e+", "E"))
    assert near(a, a, absolute, relative) or big


def test_nearness_is_not_transitive() -> None:
    assert near("1.0", "1.4", 0.5) and near("1.4", "1.8", 0.5) and not near("1.0", "1.8", 0.5)


parts = st.lists(st.floats(-1e300, 1e300, allow_nan=False), min_size=3, max_size=3)


@deterministic
@given(parts, parts, st.floats(-1, 1))
def test_cosine_is_symmetric_and_that_of_the_vectors(one: list[float], other: list[float], least: float) -> None:
    rule = Embedding(least)
    a, b = comparable(rule, b"", one), comparable(rule, b"", other)
    assert alike(rule, a, b) == alike(rule, b, a)
    if a is not None and b is not None:
        cosine = math.fsum(x * y for x, y in zip(a, b, strict=True))
        assert -1 - 1e-9 <= cosine <= 1 + 1e-9
        assert alike(Embedding(1.0), a, a)


def test_a_vector_without_direction_is_equal_to_nothing() -> None:
    rule = Embedding(-1.0)
    good = comparable(rule, b"", (1.0, 2.0))
    for bad in ((0.0, 0.0), (math.nan, 1.0), (math.inf, 1.0), (), None):
        assert comparable(rule, b"", bad) is None
        assert not alike(rule, good, comparable(rule, b"", bad))
    assert not alike(rule, good, comparable(rule, b"", (1.0, 2.0, 3.0)))
    assert alike(Embedding(0.99), good, comparable(rule, b"", (2.0, 4.0)))
    assert not alike(Embedding(0.99), good, comparable(rule, b"", (2.0, -1.0)))


def test_a_new_result_is_compared_with_those_that_are_there() -> None:
    rule = Numeric(0.5)
    there = {one: (f"d{one}", comparable(rule, text)) for one, text in ((1, b"1.0"), (3, b"1.4"))}
    made = pairs_with(rule, 2, "d2", comparable(rule, b"1.8"), there)
    assert made == (Pair(1, 2, False), Pair(2, 3, True))
    assert pairs_with(CanonicalJson(), 2, "d2", None, there) == ()
    # A critic is not asked about the same bytes, and about the rest nothing is known.
    assert pairs_with(PairCritic(), 2, "d3", None, there) == (Pair(2, 3, True),)


def test_where_judges_differ_a_pair_is_not_equal() -> None:
    for verdicts in ((True, False), (False, True)):
        assert agreed([Pair(1, 2, verdicts[0]), Pair(2, 1, verdicts[1])]) == {(1, 2): False}
    assert agreed([Pair(1, 2, True), Pair(1, 2, True)]) == {(1, 2): True}
