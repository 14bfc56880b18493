"""Hints of the log's head wake whom they concern, and nobody too few."""

import pytest
from hive_common.bus.heads import concerns

WANTED = ("AgentVersionPublished", "ExecutorRegistered")


@pytest.mark.parametrize(
    "hint",
    [
        b'{"position":5,"types":["TaskCreated","AgentVersionPublished"]}',
        b'{"position":5}',
        b'{"position":5,"types":["TaskCreated","ComesWithALaterRelease"]}',
        b"not a hint",
    ],
    ids=["wanted type", "types not said", "type that this code does not know", "unreadable"],
)
def test_hint_that_may_hold_a_wanted_event_concerns_its_reader(hint: bytes) -> None:
    assert concerns(hint, WANTED)


def test_hint_of_other_types_concerns_only_readers_of_everything() -> None:
    hint = b'{"position":5,"types":["TaskCreated","JobSubmitted"]}'
    assert not concerns(hint, WANTED)
    assert concerns(hint, None)
