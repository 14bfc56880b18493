"""Steps that are closed before the deadline and joined with what there is."""

from typing import Any

import msgspec
import pytest
from hive_common.contracts import events
from hive_common.contracts.events import Child, StepJoined
from hive_common.kernel.errors import InvalidArgument
from hive_scheduler.domain.joining import next_due_us

from .joins import SECOND_US, Fails, Play, fork, integrated

OUTPUT = "${tasks.work.output}"
SUM = {"sum@1": 20_000}
"""The integrator may take 20 s of the job's 100 s."""


def reasons(played: Play, *steps: str) -> list[str]:
    tasks = {
        task.id for step in steps for task in (*played.job.steps[step].tasks, *played.job.steps[step].children)
    }
    return [event.reason for at, event in played.log if at in tasks and isinstance(event, events.TaskCancelled)]


# --- when ---


def due_s(*steps: dict[str, Any], **fields: Any) -> float:
    played = Play(*steps, **fields)
    return next_due_us(played.job, 0) / SECOND_US


def test_a_step_is_closed_so_long_before_the_deadline_as_its_integrator_may_take() -> None:
    assert due_s(integrated(), timeouts_ms=SUM) == 80
    assert due_s(integrated(integrator={"reserve": "30s"}), timeouts_ms=SUM) == 70
    # Half of the job's time at most, unless it is said.
    assert due_s(integrated(), timeouts_ms={"sum@1": 300_000}) == 50
    assert due_s(integrated(integrator={"reserve": "70s"})) == 30


def test_and_as_the_tasks_that_follow_may_take() -> None:
    after = {"id": "after", "needs": ["work"], "timeout": "7s"}
    last = {"id": "last", "needs": ["after"]}
    assert due_s(fork(on_failure="skip"), after, last) == 100 - 7 - 5
    assert due_s(integrated(), after, last, timeouts_ms=SUM) == 100 - 20 - 7 - 5
    # A second before the deadline where nothing follows.
    assert due_s(fork(on_failure="skip")) == 99
    assert due_s(fork(on_failure="skip"), deadline="1s") == 0.5


def test_a_job_in_which_no_step_is_closed_is_woken_at_its_deadline_alone() -> None:
    assert due_s(fork()) == 100
    assert due_s(fork(join="vote")) == 100


def test_a_reserve_that_leaves_no_time_is_refused() -> None:
    with pytest.raises(InvalidArgument) as caught:
        Play(integrated(integrator={"reserve": "100s"}))
    assert caught.value.fields["path"] == "tasks[0].join.integrator.reserve"


def test_the_times_come_one_after_the_other_and_move_with_the_clock() -> None:
    played = Play(integrated(1), fork(1, on_failure="skip") | {"id": "other"}, timeouts_ms=SUM)
    assert next_due_us(played.job, 0) == 80 * SECOND_US
    assert next_due_us(played.job, 80 * SECOND_US) == 99 * SECOND_US
    assert next_due_us(played.job, 99 * SECOND_US) == 100 * SECOND_US
    played.job.deadline_us += 1_000 * SECOND_US
    assert next_due_us(played.job, 0) == 1_080 * SECOND_US
    played.wait_until(81)
    assert played.job.steps["work"].joined is None
    played.run(played.task("work"), 1)
    assert next_due_us(played.job, 0) == 1_099 * SECOND_US


# --- what ---


def test_at_that_time_the_integrator_gets_what_there_is() -> None:
    played = Play(integrated(3), output=OUTPUT, timeouts_ms=SUM)
    played.run(played.task("work", 1), "in time")
    played.wait_until(79.9)
    assert played.job.steps["work"].joined is None
    played.wait_until(80)
    assert reasons(played, "work") == ["partial", "partial"]
    given = played.given(played.integrator("work"))
    assert given["results"] == [
        {"index": 0, "status": "missing"},
        {"index": 1, "status": "succeeded", "value": "in time"},
        {"index": 2, "status": "missing"},
    ]
    assert (given["partial"], given["succeeded"], given["size"]) == (True, 1, 3)
    played.run(played.integrator("work"), "integrated")
    assert played.output() == "integrated"
    joined = played.joined("work")
    assert (joined.order, joined.missing, joined.partial, joined.closed) == ((1,), (0, 2), True, True)


@pytest.mark.parametrize(
    ("words", "output"), [({"on_failure": "skip"}, ["a"]), ({"on_failure": "default", "default": 0}, ["a", 0, 0])]
)
def test_without_an_integrator_the_step_gives_what_there_is(words: dict[str, Any], output: Any) -> None:
    played = Play(fork(3, **words), output=OUTPUT)
    played.run(played.task("work", 0), "a")
    played.wait_until(99)
    assert played.output() == output


def test_too_little_by_then_fails_the_job() -> None:
    played = Play(integrated(3, minimum=2), output=OUTPUT, timeouts_ms=SUM)
    played.run(played.task("work", 1), "in time")
    played.wait_until(80)
    code, message = played.failure()
    assert code == "too_few_results"
    assert message == "task `work`: 1 of 3 succeeded (2 cancelled), and at least 2 had to"


def test_an_integrator_that_does_not_end_in_time_is_the_end_of_the_job() -> None:
    played = Play(integrated(1), timeouts_ms=SUM)
    played.wait_until(80)
    assert played.integrator("work").status == "ready"
    played.wait_until(100)
    assert played.failure()[0] == "deadline_exceeded"
    assert played.integrator("work").status == "cancelled"


def test_a_task_that_failed_before_still_fails_the_job_unless_it_may() -> None:
    played = Play(integrated(2), timeouts_ms=SUM)
    played.run(played.task("work", 1), Fails("timeout"))
    assert played.failure()[0] == "timeout"


def test_valid_attempts_of_a_task_that_keeps_all_are_not_lost() -> None:
    words = {
        "speculate": {"replicas": 3, "keep": "all", "distinct": "none"},
        "verify": {"critic": {"agent": "c@1"}},
    }
    step = {"id": "work", **words, "join": {"integrator": {"agent": "sum@1"}}}
    played = Play(step, output=OUTPUT, timeouts_ms=SUM)
    for answer in ("scored", "not scored"):
        played.run(played.task("work"), answer)
    played.run(played.job.steps["work"].judges[0], {"score": 0.5})
    played.wait_until(80)
    assert [one.status for one in played.job.steps["work"].judges] == ["succeeded", "cancelled", "ready"]
    given = played.given(played.integrator("work"))
    assert given["results"][0] == {"index": 1, "status": "succeeded", "value": "scored", "score": 0.5}
    assert (given["partial"], given["succeeded"], given["size"]) == (True, 1, 3)


def test_children_that_have_not_ended_are_not_waited_for() -> None:
    played = Play({"id": "work", "on_failure": "skip"}, output={"forked": "${tasks.work.forked}"})
    children = tuple(Child("a@1", msgspec.Raw(text)) for text in (b"1", b"2"))
    played.run(played.task("work"), "parent", forks=children)
    played.run(played.job.steps["work"].children[0], "one")
    played.wait_until(99)
    assert played.output() == {"forked": [{"agent": "a@1", "output": "one"}]}
    assert played.joined("work").partial


# --- what comes before it ---


BEFORE = {"id": "plan"}
NESTED = {"id": "work", "needs": ["plan"], "fork": "${tasks.plan.output}", "input": {"n": "${item}"}}
JOIN = {"join": {"integrator": {"agent": "sum@1"}}}


def test_what_only_it_waits_for_is_not_waited_for_either() -> None:
    played = Play(BEFORE, {**NESTED, **JOIN}, output=OUTPUT, timeouts_ms=SUM)
    played.wait_until(80)
    assert reasons(played, "plan") == ["partial"]
    # A fork whose list never came has nothing.
    assert played.joined("work") == StepJoined(
        "work", "integrator", partial=True, closed=True, task=played.integrator("work").id
    )
    assert played.given(played.integrator("work"))["results"] == []
    played.run(played.integrator("work"), "of nothing")
    assert played.output() == "of nothing"


def test_unless_the_minimum_says_that_this_is_too_little() -> None:
    played = Play(BEFORE, {**NESTED, **JOIN, "minimum": 1}, output=OUTPUT, timeouts_ms=SUM)
    played.wait_until(80)
    assert played.failure() == ("too_few_results", "task `work`: 0 of 0 succeeded, and at least 1 had to")


def test_what_others_need_as_well_goes_on() -> None:
    other = {"id": "other", "needs": ["plan"], "input": "${tasks.plan.output}"}
    played = Play(BEFORE, {**NESTED, **JOIN}, other, timeouts_ms=SUM)
    played.wait_until(80)
    assert reasons(played, "plan", "other") == []
    played.run(played.integrator("work"), "of nothing")
    played.run(played.task("plan"), [1])
    played.run(played.task("other"), "done")
    assert isinstance(played.job.end, events.JobSucceeded)


def test_what_the_output_reads_goes_on() -> None:
    played = Play(BEFORE, {**NESTED, **JOIN}, output={"plan": "${tasks.plan.output}"}, timeouts_ms=SUM)
    played.wait_until(80)
    played.run(played.integrator("work"), "of nothing")
    assert played.job.end is None
    played.run(played.task("plan"), [1])
    assert played.output() == {"plan": [1]}


def test_a_step_before_it_that_is_closed_first_gives_what_it_has() -> None:
    first = {"id": "first", "fork": [1, 2], "input": "${item}", "on_failure": "skip"}
    second = {"id": "work", "needs": ["first"], "fork": "${tasks.first.output}", "input": "${item}", **JOIN}
    played = Play(first, second, output=OUTPUT, timeouts_ms=SUM)
    played.run(played.task("first", 1), "a part")
    played.wait_until(100 - 20 - 5)
    assert [played.given(one) for one in played.job.steps["work"].tasks] == ["a part"]
    played.run(played.task("work"), "of a part")
    assert [one["value"] for one in played.given(played.integrator("work"))["results"]] == ["of a part"]


def test_of_two_that_are_both_late_only_the_last_is_joined() -> None:
    # As after a leader that was away for long.
    first = {"id": "first", "fork": [1, 2], "input": "${item}", "on_failure": "skip", "minimum": 1}
    second = {"id": "work", "needs": ["first"], "fork": "${tasks.first.output}", "input": "${item}", **JOIN}
    played = Play(first, second, output=OUTPUT, timeouts_ms=SUM)
    played.wait_until(90)
    assert reasons(played, "first") == ["partial", "partial"]
    assert played.job.steps["first"].joined is None
    played.run(played.integrator("work"), "of nothing")
    assert played.output() == "of nothing"


# --- crashes ---


def test_a_crash_in_the_midst_of_closing_changes_nothing() -> None:
    for most in range(1, 8):
        played = Play(
            BEFORE | {"fork": [1, 2], "on_failure": "skip"}, integrated(3) | {"needs": ["plan"]}, output=OUTPUT
        )
        played.run(played.task("plan", 0), 1)
        played.run(played.task("plan", 1), 1)
        played.run(played.task("work", 1), "in time")
        played.now_us = 95 * SECOND_US
        played.advance(most)
        played.crash()
        # Also where the clock of the new leader is behind.
        played.now_us -= (most > 1) * 10 * SECOND_US
        played.advance()
        assert played.joined("work").order == (1,)
        assert played.given(played.integrator("work"))["size"] == 3
        played.run(played.integrator("work"), "integrated")
        assert played.output() == "integrated"


def test_a_leader_that_comes_late_looks_at_the_list_before_it_closes_the_step() -> None:
    played = Play(BEFORE, {**NESTED, **JOIN}, output=OUTPUT, timeouts_ms=SUM)
    played.attempt(played.task("plan"), [1, 2, 3])
    played.crash()
    played.wait_until(80)
    joined = played.joined("work")
    assert (joined.missing, joined.partial) == ((0, 1, 2), True)
    assert played.given(played.integrator("work"))["size"] == 3
