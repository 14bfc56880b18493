"""What a new leader makes of times that were written down by another clock."""

import itertools

import msgspec
import pytest
from hive_common.contracts import events, values
from hive_common.contracts.events import AgentRef, Event, JobSubmitted, RetryPolicy, TaskCreated
from hive_common.eventlog.envelope import Stored
from hive_scheduler.recovery import Fold
from hive_scheduler.submission import Specs

JOB, TASK = "00000000-0000-7000-8000-000000000001", "00000000-0000-8000-8000-000000000002"
SECOND_US = 1_000_000
HOUR_US = 3_600 * SECOND_US
NOW_US = 1_800_000_000 * SECOND_US
DEADLINE_US = 60 * SECOND_US
DOCUMENT = {
    "apiVersion": "hive/v1",
    "kind": "Job",
    "name": "clock",
    "tasks": [{"id": "only", "agent": "a@1.0.0", "retry": {"max_attempts": 2, "backoff": "1s"}}],
}


def folded(written_at_us: int, now_us: int):
    """Fold a job whose only task failed once and is to be tried again after a second."""
    history: list[tuple[str, Event]] = [
        (
            JOB,
            JobSubmitted(
                name="clock",
                document=msgspec.Raw(msgspec.json.encode(DOCUMENT)),
                input=values.inline(b"null"),
                agents={"a@1.0.0": AgentRef("a", "1.0.0", "sha256:0", "python", 1, 1_000, 1)},
                request_digest="",
                deadline_us=written_at_us + DEADLINE_US,
            ),
        ),
        (TASK, TaskCreated(JOB, "only", "a@1.0.0", input=values.inline(b"{}"), retry=RetryPolicy(2, 1_000))),
        (TASK, events.TaskAssigned(1, "x", "s", 6_000)),
        (TASK, events.AttemptFailed(1, "agent_error")),
        (TASK, events.TaskRetryScheduled(written_at_us + SECOND_US)),
    ]
    numbers = {JOB: itertools.count(1), TASK: itertools.count(1)}
    fold = Fold(Specs(), now_us)
    fold.apply(
        Stored(
            position=position,
            stream=stream,
            version=next(numbers[stream]),
            type=type(event).__name__,
            schema=1,
            ts_us=written_at_us,
            actor="",
            owner="",
            ns="default",
            subject=None,
            correlation=JOB,
            causation="",
            payload=events.encode(event),
            event=b"",
            hash=b"",
        )
        for position, (stream, event) in enumerate(history, 1)
    )
    job = fold.jobs[JOB]
    return job.deadline_us, job.tasks[TASK].not_before_us


@pytest.mark.parametrize("ahead_us", [HOUR_US, 2 * SECOND_US])
def test_a_clock_that_stood_ahead_makes_no_pause_and_no_deadline_longer(ahead_us):
    assert folded(NOW_US + ahead_us, NOW_US) == (NOW_US + DEADLINE_US, NOW_US + SECOND_US)


@pytest.mark.parametrize("ago_us", [0, SECOND_US // 2, HOUR_US])
def test_what_was_written_in_the_past_comes_when_it_says(ago_us):
    then_us = NOW_US - ago_us
    assert folded(then_us, NOW_US) == (then_us + DEADLINE_US, then_us + SECOND_US)
