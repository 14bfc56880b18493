"""The storm's oracle against histories that break each law: a storm that finds nothing has looked."""

import importlib
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = {"inline": {"square": 9}, "size_bytes": 12}
SUBMITTED = ("job", "JobSubmitted", {"name": "nonce"})
CREATED = ("task", "TaskCreated", {"job": "job"})
SUCCEEDED = ("task", "AttemptSucceeded", {"attempt": 1, "output": OUTPUT})
DECIDED = ("task", "TaskSucceeded", {"attempt": 1})
ENDED = ("job", "JobSucceeded", {"output": {"inline": 9}})


def assigned(number=1, session="s", task="task", executor="x"):
    return (task, "TaskAssigned", {"attempt": number, "executor": executor, "session": session})


def succeeded(number=1, task="task"):
    return [
        (task, "AttemptSucceeded", {"attempt": number, "output": OUTPUT}),
        (task, "TaskSucceeded", {"attempt": number}),
    ]


def lost(number=1):
    return ("task", "AttemptLost", {"attempt": number, "reason": "lease_expired"})


GOOD = [SUBMITTED, CREATED, assigned(), SUCCEEDED, DECIDED, ENDED]


@pytest.fixture(scope="module")
def storm():
    """The modules of the storm, which is no installed package."""
    sys.path.insert(0, str(ROOT))
    try:
        yield {
            name: importlib.import_module(f"tests.chaos.storm.{name}")
            for name in ("clients", "line", "oracle", "plan", "target", "wires")
        }
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def told(storm):
    """Return a function from a history, and from what one client was told, to the storm's line."""

    def line(history, jobs=("job",), audit_ok=True, struck=(), expected="succeeded", tasks=1, refused=None):
        planned = storm["plan"].Planned("nonce", {}, tasks, expected, output=9)
        record = storm["clients"].Record(planned, set(jobs), 1.0 if jobs else None, refused=refused)
        return storm["line"].line_of(1, [record], replayed(storm, history), struck, {"ok": audit_ok}, [])

    return line


def replayed(storm, history):
    versions: dict[str, int] = {}
    events = []
    for position, (stream, kind, data) in enumerate(history, 1):
        versions[stream] = versions.get(stream, 0) + 1
        events.append(storm["oracle"].Event(position, stream, versions[stream], kind, float(position), data))
    return storm["oracle"].replay(events)


def test_a_good_history_has_nothing_wrong(told):
    line = told(GOOD)
    assert line["ok"], line
    assert (line["tasks"], line["completed_once"], line["acknowledged"]) == (1, 1, 1)


def test_late_reports_may_follow_the_end_once_for_each_attempt(told):
    late = ("task", "AttemptLate", {"attempt": 1, "status": "succeeded"})
    good = [SUBMITTED, CREATED, assigned(), lost(), assigned(2), *succeeded(2), ENDED, late]
    assert told(good)["ok"]
    assert told([*good, late])["duplicated"] == 1


@pytest.mark.parametrize(
    ("history", "finding"),
    [
        ([], "lost"),
        (GOOD[:-1], "lost"),
        ([SUBMITTED, CREATED, assigned(), ENDED], "lost"),
        ([*GOOD, ENDED], "duplicated"),
        ([*GOOD[:-1], DECIDED, ENDED], "duplicated"),
        ([*GOOD[:-1], ("task", "TaskFailed", {"code": "trap"}), ENDED], "duplicated"),
        ([SUBMITTED, CREATED, assigned(), lost(), assigned(1, "t"), *GOOD[3:]], "duplicated"),
        ([*GOOD, ("other", "JobSubmitted", {"name": "nonce"}), ("other", "JobSucceeded", ENDED[2])], "duplicated"),
        ([SUBMITTED, CREATED, assigned(), lost(), *GOOD[3:]], "stale_accepted"),
        ([SUBMITTED, CREATED, *GOOD[3:]], "stale_accepted"),
        ([*GOOD, SUCCEEDED], "stale_accepted"),
        ([*GOOD[:3], ("job", "JobCancelRequested", {}), *GOOD[3:]], "stale_accepted"),
        ([*GOOD[:3], DECIDED, ENDED], "stale_accepted"),
    ],
    ids=[
        "job is not in the log",
        "job has no end",
        "task has no end",
        "job ends twice",
        "task is decided twice",
        "task succeeds and fails",
        "attempt number is used twice",
        "one submit is two jobs",
        "attempt that is lost succeeds",
        "attempt that never was succeeds",
        "attempt succeeds after its task",
        "attempt succeeds after the cancel",
        "task is decided without an attempt's success",
    ],
)
def test_the_oracle_finds(told, history, finding):
    line = told(history)
    assert line[finding] > 0, line
    assert not line["ok"]
    assert line["problems"]


def test_a_forged_output_in_the_log_is_stale(told, storm):
    forged = ("task", "AttemptSucceeded", {"attempt": 1, "output": storm["wires"].FORGED})
    assert told([*GOOD[:3], forged, *GOOD[4:]])["stale_accepted"] == 1


def test_an_output_that_is_not_the_one_asked_for_is_no_good_end(told):
    line = told([*GOOD[:-1], ("job", "JobSucceeded", {"output": {"inline": 8}})])
    assert not line["ok"]
    assert "output" in line["problems"][0]


def test_an_auditor_that_finds_a_break_is_a_break(told):
    assert not told(GOOD, audit_ok=False)["ok"]


def test_a_submit_without_an_answer_is_there_as_a_whole_or_not_at_all(told):
    there, absent = told(GOOD, jobs=()), told([], jobs=())
    assert (there["ok"], there["unknown"], there["unknown_in_log"]) == (True, 1, 1)
    assert (absent["ok"], absent["unknown"], absent["unknown_in_log"]) == (True, 1, 0)
    assert told(GOOD[:-1], jobs=())["lost"] == 1
    assert not told(GOOD, jobs=(), tasks=2)["ok"], "a job of which only a part is there"


def test_a_job_that_was_refused_must_not_be_in_the_log(told):
    assert told([], jobs=(), expected="refused", refused=400)["ok"]
    assert not told(GOOD, jobs=(), expected="refused", refused=400)["ok"]
    assert not told(GOOD, expected="refused")["ok"]


def test_a_submit_that_was_told_two_jobs_is_doubled(told):
    assert told(GOOD, jobs=("job", "job-2"))["duplicated"] == 1


def test_recovery_counts_from_the_kill_to_the_first_task_decided_once_all_is_ready_again(told, storm):
    strike = storm["target"].Strike("kill scheduler", at=2.5, ready_at=4.5)
    assert told(GOOD, struck=[strike])["recovery_max_s"] == 2.5
    never = storm["target"].Strike("kill scheduler", at=2.5, ready_at=time.time())
    assert "nothing was done after it" in told(GOOD, struck=[never])["problems"][0]


def test_the_supervisor_counts_from_the_next_start_to_a_job_that_was_submitted_since_and_is_done(told, storm):
    def killed(at):
        return told(GOOD, struck=[storm["target"].Strike("kill supervisor", at=at, ready_at=4.0)])

    # The job of this history was acknowledged at 1.0 and ended at 6.0.
    assert killed(0.5)["recovery_max_s"] == 5.5
    assert "nothing was done after it" in killed(1.5)["problems"][0]


def test_an_executor_is_not_back_before_what_it_held_is_over(told, storm):
    other = [("other", "TaskCreated", {"job": "job"}), assigned(task="other", executor="y")]
    history = [SUBMITTED, CREATED, assigned(), *other, *succeeded(task="other"), SUCCEEDED, DECIDED, ENDED]
    strike = storm["target"].Strike("kill executor", at=3.5, ready_at=4.0, executor="x")
    assert told(history, struck=[strike], tasks=2)["recovery_max_s"] == pytest.approx(8 - 3.5)


@pytest.mark.parametrize("percent", [(0.5, 2.0), (0.99, 4.0), (1, 4.0)])
def test_percentiles_are_nearest_ranks(storm, percent):
    share, wanted = percent
    assert storm["line"].percentile([1.0, 2.0, 3.0, 4.0], share) == wanted
