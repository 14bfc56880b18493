"""What a task forks is what a person approved of, call by call, where a person is asked."""

from collections.abc import Sequence

import msgspec
import pytest
from hive_common.contracts.events import Child, RetryPolicy
from hive_common.permissions.actions import fork_action
from hive_scheduler.domain.approval import ApprovalState, ApprovalStatus
from hive_scheduler.domain.forks import all_approved
from hive_scheduler.domain.task import TaskState

TASK = TaskState("t", "j", "s", None, "plan@1.0.0", 1_000, RetryPolicy())
TWO = ("square@1.0.0", (b'{"n":1}', b'{"n":2}'))
ONE = ("cube@1.0.0", (b"{}",))


def approval(
    call: tuple[str, Sequence[bytes]], status: ApprovalStatus = "approved", task: str = "t", agent: str = TASK.agent
) -> ApprovalState:
    action = fork_action(agent, *call)
    return ApprovalState("a", "j", task, 1, agent, "fork", action.text, action.hash, 0, status)


def wanted(*calls: tuple[str, Sequence[bytes]]) -> list[Child]:
    return [Child(agent, msgspec.Raw(one)) for agent, inputs in calls for one in inputs]


APPROVED = [approval(TWO), approval(ONE)]


@pytest.mark.parametrize("calls", [[TWO], [ONE], [TWO, ONE], [ONE, TWO], [TWO, TWO, ONE], []])
def test_calls_that_were_approved_of_are_taken_in_any_order(calls: list[tuple[str, Sequence[bytes]]]) -> None:
    assert all_approved(TASK, wanted(*calls), APPROVED)


@pytest.mark.parametrize(
    "other",
    [
        ("square@1.0.0", (b'{"n":1}',)),
        ("square@1.0.0", (b'{"n":2}', b'{"n":1}')),
        ("square@1.0.0", (b'{"n":1}', b'{"n":3}')),
        ("square@1.0.1", TWO[1]),
        ("square@1.0.0", (*TWO[1], b"{}")),
    ],
)
def test_what_differs_from_all_that_was_approved_of_is_not(other: tuple[str, Sequence[bytes]]) -> None:
    for calls in ([other], [ONE, other], [other, ONE], [TWO, other]):
        assert not all_approved(TASK, wanted(*calls), APPROVED)


@pytest.mark.parametrize(
    "approvals",
    [
        [],
        [approval(TWO, "pending"), approval(ONE, "pending")],
        [approval(TWO, "denied"), approval(TWO, "expired")],
        [approval(TWO, task="another")],
        [approval(TWO, agent="another@1.0.0")],
    ],
)
def test_what_is_not_approved_of_or_for_another_counts_for_nothing(approvals: list[ApprovalState]) -> None:
    assert not all_approved(TASK, wanted(TWO), approvals)
