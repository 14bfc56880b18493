"""The auditor reads the rule of a task with code of its own; it is the one that the scheduler applies."""

import itertools
from typing import Any

import msgspec
import pytest
from hive_audit.rules import rule_of
from hive_common.contracts.jobdocument import Task
from hive_common.kernel.errors import InvalidArgument
from hive_scheduler.domain.judging import judging_of

AGENT, JUDGE = "solver@1.0.0", "judge@1.0.0"
SPECULATE: list[dict[str, Any]] = [
    {},
    {"replicas": 3},
    {"replicas": 3, "keep": "all", "distinct": "none"},
    {"replicas": 2, "hedge_after": "p95", "distinct": "owner"},
    {"distinct": "executor"},
]
EQUAL: list[Any] = [
    "exact",
    "json",
    {"numeric": {"absolute": 0.5, "relative": 0.01}},
    {"embedding": {"min": 0.9, "agent": JUDGE}},
    {"critic": {"agent": JUDGE}},
]
QUORUM: list[dict[str, Any] | None] = [
    None,
    {"k": 1, "of": 2},
    {"k": 2, "of": 3, "on_none": "fail"},
    {"k": 2, "of": 3, "extend_to": 9, "adaptive": True},
    {"k": 2, "of": 60},
    {"k": 2, "of": 3, "on_none": "escalate"},
    *({"k": 2, "of": 2, "equal": equal} for equal in EQUAL),
]
CRITIC: list[dict[str, Any] | None] = [None, {"agent": JUDGE}, {"agent": JUDGE, "min_score": 0.7}]
TEST: list[dict[str, Any] | None] = [None, {"agent": JUDGE}]


def tasks() -> list[Task]:
    """Return every task of these words that a scheduler accepts."""
    found = []
    for speculate, quorum, critic, test in itertools.product(SPECULATE, QUORUM, CRITIC, TEST):
        said = {"quorum": quorum, "critic": critic, "test": test}
        verify = {name: words for name, words in said.items() if words is not None}
        if quorum is not None and quorum.get("on_none") == "escalate":
            verify["senior"] = {"agent": JUDGE}
        words = {"id": "a", "agent": AGENT, "speculate": speculate, "verify": verify}
        task = msgspec.convert(words, Task)
        try:
            judging_of(task, "tasks[0]")
        except InvalidArgument:
            continue
        found.append(task)
    return found


def test_both_read_the_same_rule_of_every_task() -> None:
    found = tasks()
    assert len(found) > 100
    for task in found:
        judging = judging_of(task, "tasks[0]")
        assert judging is not None
        assert rule_of(task) == judging.rule, task


@pytest.mark.parametrize("words", [{}, {"speculate": {"distinct": "owner"}}])
def test_a_task_with_few_words(words: dict[str, Any]) -> None:
    task = msgspec.convert({"id": "a", "agent": AGENT, "verify": {"test": {"agent": JUDGE}}, **words}, Task)
    judging = judging_of(task, "tasks[0]")
    assert judging is not None and rule_of(task) == judging.rule
