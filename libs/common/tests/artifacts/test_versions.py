from random import Random

import pytest
from hive_common.artifacts.versions import sort_key
from hive_common.kernel.errors import InvalidArgument
from hypothesis import given
from hypothesis import strategies as st

# Semantic Versioning 2.0.0, section 11, and what its words say besides.
ORDERED = [
    "0.0.1",
    "0.9.0",
    "0.10.0",
    "1.0.0-0",
    "1.0.0-2",
    "1.0.0-10",
    "1.0.0--",
    "1.0.0-alpha",
    "1.0.0-alpha.1",
    "1.0.0-alpha.beta",
    "1.0.0-alpha1",
    "1.0.0-beta",
    "1.0.0-beta.2",
    "1.0.0-beta.11",
    "1.0.0-rc.1",
    "1.0.0",
    "1.0.1-alpha",
    "1.0.1",
    "2.0.0",
    "10.0.0",
]


def test_keys_sort_as_versions_do() -> None:
    assert (
        sorted(Random(1).sample(ORDERED, len(ORDERED)), key=lambda version: sort_key(version).encode()) == ORDERED
    )


def test_build_metadata_has_no_precedence() -> None:
    assert sort_key("1.0.0+b") == sort_key("1.0.0+a-1") == sort_key("1.0.0")


@pytest.mark.parametrize("wrong", ["", "1", "1.0", "v1.0.0", "1.0.0.0", "1.0.0\n"])
def test_what_is_no_version_has_no_key(wrong: str) -> None:
    with pytest.raises(InvalidArgument):
        sort_key(wrong)


numbers = st.integers(0, 999_999_999)


@given(st.tuples(numbers, numbers, numbers), st.tuples(numbers, numbers, numbers))
def test_releases_compare_by_their_numbers(one: tuple[int, int, int], two: tuple[int, int, int]) -> None:
    first, second = (sort_key("{}.{}.{}".format(*numbers)).encode() for numbers in (one, two))
    assert (first < second) == (one < two)
