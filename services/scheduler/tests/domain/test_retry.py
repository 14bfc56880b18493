"""What follows when an attempt ends without success."""

import pytest
from hive_common.contracts import events, values
from hive_common.contracts.events import RetryPolicy, TaskCreated
from hive_common.contracts.limits import LOST_ATTEMPTS_MAX
from hive_scheduler.domain import task as tasks
from hive_scheduler.domain.task import BACKOFF_MAX_MS, TaskState


def ready_task(**retry: object) -> TaskState:
    created = TaskCreated("job", "s", "a@1.0.0", input=values.inline(b"{}"), retry=RetryPolicy(**retry))  # type: ignore[arg-type]
    return tasks.created("task", created)


def step(task: TaskState, command: tasks.Command) -> list[events.Event]:
    decided = tasks.decide(task, command)
    for event in decided:
        tasks.evolve(task, event)
    return decided


def fail(task: TaskState, code: str, now_us: int = 0) -> events.Event:
    step(task, tasks.Assign("e", "s", 6_000, task.not_before_us))
    return step(task, tasks.Fail(len(task.attempts), "e", "s", code, now_us))[-1]


def test_the_pause_doubles_up_to_its_limit() -> None:
    task = ready_task(max_attempts=100, backoff_ms=1_000)
    pauses = []
    for _ in range(40):
        retry = fail(task, "agent_error")
        assert isinstance(retry, events.TaskRetryScheduled)
        pauses.append(retry.not_before_us // 1_000)
    assert pauses[:4] == [1_000, 2_000, 4_000, 8_000]
    assert set(pauses[9:]) == {BACKOFF_MAX_MS}


def test_by_default_a_task_has_one_attempt() -> None:
    assert fail(ready_task(), "agent_error") == events.TaskFailed("agent_error", "", 1)


@pytest.mark.parametrize("code", ["lost", "runner_died"])
def test_failures_of_devices_have_a_bound_of_their_own_and_no_pause(code: str) -> None:
    task = ready_task()
    for _ in range(LOST_ATTEMPTS_MAX):
        assert fail(task, code, now_us=7) == events.TaskRetryScheduled(7)
    assert isinstance(fail(task, code), events.TaskFailed)


def test_a_task_that_was_lost_too_often_says_how_in_words() -> None:
    task = ready_task()
    for number in range(1, LOST_ATTEMPTS_MAX + 2):
        step(task, tasks.Assign("e", "s", 6_000, task.not_before_us))
        end = step(task, tasks.Lose(number, "overtime", 0))[-1]
    message = (
        "lost too often, the last time because the executor did not say within its time how it ended (overtime)"
    )
    assert end == events.TaskFailed("lost", message, LOST_ATTEMPTS_MAX + 1)


def test_what_kill_orders_take_counts_against_nothing() -> None:
    task = ready_task()
    for number in range(1, 3 * LOST_ATTEMPTS_MAX):
        step(task, tasks.Assign("e", "s", 6_000, task.not_before_us))
        assert step(task, tasks.Lose(number, tasks.KILLED, 7))[-1] == events.TaskRetryScheduled(7)
    assert (task.losses, task.failures) == (0, 0)


def test_losses_take_nothing_from_the_retries() -> None:
    task = ready_task(max_attempts=2, backoff_ms=0)
    fail(task, "lost")
    assert isinstance(fail(task, "trap"), events.TaskRetryScheduled)
    assert isinstance(fail(task, "lost"), events.TaskRetryScheduled)
    assert isinstance(fail(task, "trap"), events.TaskFailed)


def test_only_the_codes_that_the_policy_names_are_tried_again() -> None:
    task = ready_task(max_attempts=3, codes=("timeout",))
    assert isinstance(fail(task, "timeout"), events.TaskRetryScheduled)
    assert isinstance(fail(task, "trap"), events.TaskFailed)


def test_what_another_attempt_cannot_change_is_not_tried_again() -> None:
    assert isinstance(fail(ready_task(max_attempts=9), "invalid_module"), events.TaskFailed)


def test_while_another_attempt_lives_nothing_is_decided() -> None:
    task = ready_task()
    for executor in ("x", "y"):
        step(task, tasks.Assign(executor, "s", 6_000, 0))
    decided = step(task, tasks.Fail(1, "x", "s", "trap", 0))
    assert [type(event) for event in decided] == [events.AttemptFailed]
    step(task, tasks.Succeed(2, "y", "s", values.inline(b"1")))
    assert (task.status, task.decided) == ("succeeded", 2)
