from itertools import count
from typing import Any

import pytest
from hive_cli.api import parse_events
from hive_cli.commands.tracking import Tracker
from hive_common.kernel.errors import UnknownEvent

_positions = count(10)


def event(stream: str, kind: str, **data: Any) -> dict[str, Any]:
    return {"position": next(_positions), "stream": stream, "type": kind, "ts_us": 1, "data": data or None}


def tracked(*events: dict[str, Any]) -> Tracker:
    tracker = Tracker()
    for one in events:
        tracker.apply(one)
    return tracker


def test_a_task_goes_from_blocked_to_its_end() -> None:
    steps = [
        (event("t", "TaskCreated", step="a"), "blocked"),
        (event("t", "TaskReady", input={"inline": 1}), "ready"),
        (event("t", "TaskAssigned", attempt=1, executor="e", session="s"), "active"),
        (event("t", "AttemptFailed", attempt=1, code="trap"), "ready"),
        (event("t", "TaskRetryScheduled", not_before_us=1), "ready"),
        (event("t", "TaskAssigned", attempt=2, executor="f", session="s"), "active"),
        (event("t", "AttemptSucceeded", attempt=2), "active"),
        (event("t", "TaskSucceeded", attempt=2), "succeeded"),
    ]
    tracker = Tracker()
    for one, state in steps:
        tracker.apply(one)
        assert tracker.counts("a") == {state: 1}
    assert (tracker.attempts, tracker.failures) == (2, 1)
    assert tracker.busy() == {}


def test_executors_are_counted_by_what_they_run() -> None:
    tracker = tracked(
        *(event(f"t{n}", "TaskCreated", step="a", input={"inline": n}) for n in range(3)),
        event("t0", "TaskAssigned", attempt=1, executor="e", session="s"),
        event("t1", "TaskAssigned", attempt=1, executor="e", session="s"),
    )
    assert tracker.busy() == {"e": 2}
    assert tracker.counts() == {"active": 2, "ready": 1}


def test_an_erased_payload_does_not_stop_the_view() -> None:
    tracker = tracked(event("j", "JobSubmitted"), event("j", "JobCancelled"))
    assert tracker.ended == "JobCancelled"


def test_an_event_it_does_not_know_stops_the_view() -> None:
    with pytest.raises(UnknownEvent, match="SomethingNew"):
        tracked(event("j", "JobSubmitted"), event("t", "SomethingNew"), event("j", "JobCancelled"))


def test_server_sent_events_are_taken_apart() -> None:
    text = (
        'retry: 1000\n\n: heartbeat\n\nid: 5\nevent: TaskReady\ndata: {"a":\ndata: 1}\n\ndata: [DONE]\n\ndata: cut'
    )
    found = list(parse_events(iter(text.split("\n"))))
    assert [(one.name, one.id, one.data) for one in found] == [
        ("TaskReady", "5", '{"a":\n1}'),
        ("message", "5", "[DONE]"),
    ]


def test_what_waits_for_a_person_is_known_until_it_has_ended() -> None:
    asked = [event(f"a{n}", "ApprovalRequested", job="j", task="t") for n in range(3)]
    tracker = tracked(*asked, event("a1", "ApprovalDecided", verdict="approved"))
    assert list(tracker.waiting) == ["a0", "a2"]
    tracker.apply(event("a0", "ApprovalExpired", reason="the task has ended"))
    tracker.apply(event("a2", "ApprovalDecided", verdict="denied"))
    assert not tracker.waiting
