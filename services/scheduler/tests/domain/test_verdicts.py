"""What judges may answer: vectors, which are bounded so that they stay in the log."""

from random import Random
from typing import Any

import msgspec
import pytest
from hive_common.contracts.events import Judging
from hive_common.contracts.values import fits_inline
from hive_common.kernel.errors import InvalidArgument
from hive_scheduler.domain import verdicts
from hive_scheduler.domain.verdicts import VECTOR_PARTS_MAX

VECTOR = Judging("vector", "task", (2,))


def read(answer: Any) -> Any:
    return verdicts.read(VECTOR, answer if isinstance(answer, bytes) else msgspec.json.encode(answer))


def test_a_vector_is_numbers_and_may_come_with_more():
    assert read({"vector": [1, -0.5, 0], "model": "m"}) == (1.0, -0.5, 0.0)
    assert read({"vector": [5e-324]}) == (5e-324,)


@pytest.mark.parametrize(
    "answer",
    [
        {"vector": []},
        {"vector": [0, 0.0, -0.0]},
        {"vector": [1, True]},
        {"vector": [1, "1"]},
        {"vector": [1, None]},
        {"vector": [[1]]},
        {"vector": {"0": 1}},
        {"vector": "1"},
        {"vector": None},
        {"vectors": [1]},
        [1],
        b'{"vector": [1e999]}',
        b'{"vector": [1' + b"0" * 400 + b"]}",
        b'{"vector": [NaN]}',
        b'{"vector": [1',
        b"",
        {"vector": [1] * (VECTOR_PARTS_MAX + 1)},
    ],
)
def test_what_is_no_vector_is_refused(answer):
    with pytest.raises(InvalidArgument) as caught:
        read(answer)
    assert caught.value.fields["path"] == "vector"
    assert "not all of them zero" in caught.value.message
    assert len(caught.value.message) < 300


def test_the_longest_vector_fits_into_the_log():
    random = Random(7)
    longest = [-random.uniform(1e-300, 9e-300) for _ in range(VECTOR_PARTS_MAX)]
    answer = msgspec.json.encode({"vector": longest})
    assert fits_inline(answer)
    assert read(answer) == tuple(longest)
