"""What people read: placements with names, and times that are those of the job."""

import json
import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hive_cli.commands import following
from hive_cli.commands.following import JobView, follow
from hive_cli.commands.job import _decision

EXECUTOR = "01a21416-91e6-707d-ae29-64a11bf32601"


def event(kind: str, ts_us: int, stream: str = "job", **data: object) -> dict[str, object]:
    return {"position": ts_us, "type": kind, "ts_us": ts_us, "stream": stream, "data": data}


def test_a_placement_is_told_with_the_name_of_the_executor_and_what_was_rejected() -> None:
    placement = {"considered": 3, "score": 1.6, "rejected": {"drained": 1, "no_free_slot": 1}}
    decision = {"attempt": 2, "executor": EXECUTOR, "placement": placement}
    told = _decision(decision, {EXECUTOR: "executor-2"})
    assert told == (
        "attempt 2 went to executor-2 with the score 1.600; executors considered: 3; "
        "1 rejected: drained; 1 rejected: no_free_slot"
    )
    assert EXECUTOR in _decision(decision, {})


def test_a_job_that_has_ended_shows_its_own_time_and_the_attempts_that_failed() -> None:
    view = JobView("name id", {})
    for one in (
        event("JobSubmitted", 1_000_000),
        event("TaskCreated", 1_100_000, "task", step="a", input={"inline": 1}),
        event("TaskAssigned", 1_200_000, "task", executor=EXECUTOR, attempt=1),
        event("AttemptFailed", 2_000_000, "task", attempt=1),
        event("TaskAssigned", 3_200_000, "task", executor=EXECUTOR, attempt=2),
        event("TaskSucceeded", 4_400_000, "task", attempt=2),
        event("JobSucceeded", 4_500_000),
    ):
        view.tracker.apply(one)
    assert view.plain() == "name id   1/1 tasks   3.5 s   1 succeeded   1 attempt failed"


class Stream:
    """A gateway that has one job, which runs through at once."""

    def get(self, path: str, **_: object) -> dict[str, Any]:
        return {"executors": []} if path == "/v1/executors" else {"job_id": "id"}

    def events(self, path: str, position: str) -> Iterator[Any]:
        for one in (
            event("JobSubmitted", 1_000_000),
            event("TaskCreated", 1_000_000, "task", step="a", input={"inline": 1}),
            event("TaskAssigned", 1_200_000, "task", executor=EXECUTOR, attempt=1),
            event("TaskSucceeded", 4_400_000, "task", attempt=1),
            event("JobSucceeded", 4_500_000),
        ):
            yield SimpleNamespace(data=json.dumps(one))


def test_without_a_terminal_silence_is_broken_until_the_job_has_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "SILENCE_S", 0.05)
    told: list[str] = []
    again = threading.Event()

    class Slow(Stream):
        def events(self, path: str, position: str) -> Iterator[Any]:
            whole = list(super().events(path, position))
            yield from whole[:-1]
            again.clear()
            assert again.wait(60), "nobody said anything"
            yield whole[-1]

    def tell(view: JobView) -> None:
        told.append(view.plain())
        again.set()

    monkeypatch.setattr(following, "_tell", tell)
    follow(Slow(), "id", "name")  # type: ignore[arg-type]
    assert "1/1 tasks" in told[-1]


def test_without_a_terminal_the_beginning_of_a_job_is_told_at_once_and_its_end_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    follow(Stream(), "id", "name")  # type: ignore[arg-type]
    began, ended = capsys.readouterr().err.splitlines()
    assert began.startswith("name id   0/1 tasks") and "1 ready" in began
    assert ended == "name id   1/1 tasks   3.5 s   1 succeeded"


def test_a_quiet_job_tells_what_its_tasks_wait_for(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(following, "QUIET_S", 0.05)
    asked = threading.Event()
    task = {"step": "a", "index": 2, "waits_for": "waits for a third device: 2 of 3 that may run it are there"}

    class Quiet(Stream):
        def get(self, path: str, **given: object) -> dict[str, Any]:
            if not path.endswith("/tasks"):
                return super().get(path, **given)
            if given["state"] != "active":
                return {"tasks": [{**task, "waits_for": None}]}
            return {"tasks": [task]}

        def events(self, path: str, position: str) -> Iterator[Any]:
            whole = list(super().events(path, position))
            yield from whole[:-1]
            assert asked.wait(60), "nobody asked"
            yield whole[-1]

    print_line = following._tell

    def tell(view: JobView) -> None:
        print_line(view)
        if view.lacks:
            asked.set()

    monkeypatch.setattr(following, "_tell", tell)
    follow(Quiet(), "id", "name")  # type: ignore[arg-type]
    *_, quiet, ended = capsys.readouterr().err.splitlines()
    assert quiet.endswith("a[2] waits for a third device: 2 of 3 that may run it are there")
    assert ended == "name id   1/1 tasks   3.5 s   1 succeeded"
