"""The two halves that keep laws 2 and 3 in the domain, each alone: what it decides and what it believes."""

import pytest
from hive_common.contracts import events, values
from hive_common.contracts.events import (
    AttemptFailed,
    AttemptLate,
    AttemptLost,
    AttemptSucceeded,
    TaskAssigned,
    TaskCancelled,
    TaskCreated,
    TaskFailed,
    TaskRetryScheduled,
    TaskSucceeded,
)
from hive_common.kernel.errors import CorruptLog
from hive_scheduler.domain import task as tasks

OUTPUT = values.inline(b"1")
ENDS = [TaskSucceeded(1), TaskFailed("agent_error"), TaskCancelled("job_failed")]


def task_after(*history):
    task = tasks.created("task", TaskCreated("job", "step", "a@1.0.0", input=values.inline(b"{}")))
    for event in history:
        tasks.evolve(task, event)
    return task


def success(attempt=1, executor="x", session="s"):
    return tasks.Succeed(attempt, executor, session, OUTPUT)


def first(session="s"):
    return TaskAssigned(1, "x", session, 6_000)


@pytest.mark.parametrize(
    "report",
    [success(executor="y"), success(session="t"), success(attempt=2)],
    ids=["executor", "session", "attempt"],
)
def test_a_report_by_who_does_not_hold_the_attempt_is_rejected(report):
    task = task_after(first())
    assert tasks.verdict(task, report) == "rejected"
    assert tasks.decide(task, report) == []


def test_a_lost_attempt_is_late_while_its_task_is_still_open():
    lost = [first(), AttemptLost(1, "lease_expired"), TaskRetryScheduled(0), TaskAssigned(2, "y", "s", 6_000)]
    task = task_after(*lost)
    assert tasks.verdict(task, success()) == "late"
    assert tasks.decide(task, success()) == [AttemptLate(1, "succeeded")]


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
def test_nothing_but_a_late_report_follows_the_end(end):
    decided = tasks.decide(task_after(first(), end), success())
    assert {type(event) for event in decided} <= {AttemptLate}
    assert tasks.decide(task_after(first(), end), tasks.Cancel("job_failed")) == []
    assert tasks.decide(task_after(first(), end), tasks.Lose(1, "lease_expired", 0)) == []


@pytest.mark.parametrize("end", ENDS, ids=lambda end: type(end).__name__)
@pytest.mark.parametrize(
    "then", [*ENDS, AttemptSucceeded(1, OUTPUT), AttemptFailed(1, "trap"), TaskAssigned(2, "y", "t", 6_000)],
    ids=lambda event: type(event).__name__,
)  # fmt: skip
def test_a_log_with_a_second_end_stops_its_reader(end, then):
    task = task_after(first(), end)
    with pytest.raises(CorruptLog):
        tasks.evolve(task, then)


def test_a_log_that_reuses_an_attempts_number_stops_its_reader():
    with pytest.raises(CorruptLog):
        task_after(first(), AttemptLost(1, "lease_expired"), first("t"))


def test_the_ends_that_the_decider_knows_are_those_of_the_catalogue():
    assert {type(end).__name__ for end in ENDS} == events.TASK_TERMINAL
