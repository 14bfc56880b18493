"""The tree of a job: what is drawn of judged tasks, of failures, and of forks that are too large to draw."""

import io
from itertools import count
from typing import Any

import pytest
from hive_cli.commands.deciding import print_decision
from hive_cli.commands.drawing import Drawing
from hive_cli.commands.following import JobView
from hive_cli.commands.past import tree_json
from hive_cli.commands.tracking import Tracker
from rich.console import Console
from rich.live import Live

NAMES = {"e1": "laptop", "e2": "desk", "e3": "pi"}
QUORUM = {"k": 2, "of": 3, "distinct": "device", "on_none": "fail"}


class Told:
    """Events of one job, a second apart, in a tracker."""

    def __init__(self) -> None:
        self.tracker = Tracker()
        self._positions = count(1)
        self("job", "JobSubmitted")

    def __call__(self, stream: str, kind: str, /, **data: Any) -> None:
        position = next(self._positions)
        event = {"position": position, "stream": stream, "type": kind, "ts_us": position * 1_000_000, "data": data}
        self.tracker.apply(event)

    def task(self, task: str, step: str = "solve", **data: Any) -> None:
        self(task, "TaskCreated", job="job", step=step, agent="solver@1.0.0", input={"inline": 1}, **data)

    def run(self, task: str, attempt: int, executor: str = "e1", output: Any = 1) -> None:
        self(task, "TaskAssigned", attempt=attempt, executor=executor, session="s")
        self(task, "AttemptSucceeded", attempt=attempt, output={"inline": output})

    def plain(self, task: str, step: str = "solve", **data: Any) -> None:
        self.task(task, step, **data)
        self.run(task, 1)
        self(task, "TaskSucceeded", attempt=1)

    def critic(self, judge: str, judged: str, attempts: list[int], verdict: Any, kind: str = "critic") -> None:
        self.task(judge, judging={"kind": kind, "task": judged, "attempts": attempts})
        self.run(judge, 1, "e3", verdict)
        self(judge, "TaskSucceeded", attempt=1)

    def lines(self, limit: int = 5) -> list[str]:
        return drawn(Drawing(self.tracker, NAMES, limit).tree("title"))


def drawn(renderable: Any, width: int = 200) -> list[str]:
    console = Console(width=width, no_color=True)
    with console.capture() as capture:
        console.print(renderable)
    return [line.strip("│├└─ ") for line in capture.get().splitlines()]


@pytest.fixture
def told() -> Told:
    return Told()


def test_attempts_scores_judges_and_the_decision_come_as_they_happen(told: Told) -> None:
    told.task("t", replicas=3)
    told("t", "TaskAssigned", attempt=1, executor="e1", session="s")
    assert told.lines() == [
        "title",
        "solve  solver@1.0.0",
        "task active",
        "#1 laptop runs  0.00 s",
        "2 more wanted",
    ]
    told("t", "AttemptSucceeded", attempt=1, output={"inline": 1})
    told.run("t", 2, "e2")
    told.critic("c1", "t", [1], {"score": 0.25})
    told.critic("c2", "t", [2], {"score": 0.5, "passed": True})
    told.critic("p", "t", [1, 2], {"equal": False}, kind="pairs")
    told.critic("s", "t", [1, 2], {"choice": 1}, kind="senior")
    told("t", "TaskAssigned", attempt=3, executor="e3", session="s")
    lines = told.lines()
    assert "#2 desk succeeded  1.00 s  score 0.5  passed" in lines
    assert "critic solver@1.0.0 of #1 succeeded  pi  1.00 s  score 0.25" in lines
    assert "pairs solver@1.0.0 of #1 #2 succeeded  pi  1.00 s  not equal" in lines
    assert "senior solver@1.0.0 of #1 #2 succeeded  pi  1.00 s  chose #2" in lines
    candidates = [{"attempt": 1, "executor": "e1", "score": 0.75}, {"attempt": 2, "executor": "e2", "score": 0.5}]
    record = {"v": 1, "task": "t", "rule": QUORUM, "outcome": "decided", "winner": 2, "votes": [1, 2]}
    told("t", "TaskDecided", decision={**record, "candidates": candidates})
    told("t", "TaskSucceeded", attempt=2)
    lines = told.lines()
    assert "rule: 2 of 3 results that are the same JSON, one vote for each device" in lines
    assert "#1 laptop succeeded  1.00 s  score 0.75  ✓ vote" in lines
    assert "#2 desk succeeded  1.00 s  score 0.5  ★ winner" in lines
    assert "#3 pi cancelled  2.00 s" in lines
    assert lines[-1] == "decided: #2 with 2 votes (#1 #2)"


def test_steps_come_in_the_order_in_which_they_began(told: Told) -> None:
    told.task("report", "report")  # exists from the job's start, and waits
    told.plain("review", "review")
    told.run("report", 1)
    told.task("last", "last")
    assert [line.split()[0] for line in told.lines() if "solver@1.0.0" in line] == ["review", "report", "last"]


def test_judges_count_neither_as_tasks_nor_in_the_summary(told: Told) -> None:
    told.task("t", replicas=1)
    told.run("t", 1)
    told.critic("c", "t", [1], {"score": 1})
    assert told.tracker.counts() == {"active": 1}
    told("t", "TaskSucceeded", attempt=1)
    assert (told.tracker.counts("solve"), told.tracker.attempts) == ({"succeeded": 1}, 2)


def test_a_judged_task_stays_active_when_an_attempt_fails_and_says_why(told: Told) -> None:
    told.task("t", replicas=1)
    told("t", "TaskAssigned", attempt=1, executor="e1", session="s")
    told("t", "AttemptLost", attempt=1, reason="lease_expired")
    told("t", "TaskExtended", attempts=2, reason="lost")
    assert told.tracker.counts() == {"active": 1}
    assert told.lines()[-2:] == ["#1 laptop lost  1.00 s  lease_expired", "2 more wanted"]


def test_an_attempt_that_failed_is_told_with_what_a_terminal_would_obey_taken_out(told: Told) -> None:
    told.task("t")
    told("t", "TaskAssigned", attempt=1, executor="e1", session="s")
    told("t", "AttemptFailed", attempt=1, code="trap", message="\x1b[31m[red]it\nbroke" + "!" * 300)
    told("t", "TaskFailed", code="trap", message="it broke", attempt=1)
    attempt, task = told.lines()[-1], told.lines()[-2]
    assert attempt.startswith("#1 laptop failed  1.00 s  trap: �[31m[red]it broke!!") and attempt.endswith("…")
    assert task == "task failed  trap: it broke"


@pytest.mark.parametrize(
    ("decision", "trust", "words"),
    [
        ({"outcome": "decided", "winner": 1, "votes": [1]}, 12, "without another one after 12 valid results"),
        ({"outcome": "decided", "winner": 1, "votes": [1]}, 0, "decided: #1"),
        ({"outcome": "kept", "votes": [1, 3]}, 0, "kept: #1 #3"),
        ({"outcome": "escalated", "winner": 3, "votes": [1, 3]}, 0, "a senior agent chose #3 of #1 #3"),
        ({"outcome": "escalated", "votes": [1, 3]}, 0, "a senior agent took none of #1 #3"),
        ({"outcome": "failed", "reason": "no_quorum"}, 0, "nothing decided: no_quorum"),
    ],
)
def test_every_outcome_has_words(told: Told, decision: dict[str, Any], trust: int, words: str) -> None:
    told.task("t", replicas=3)
    told("t", "TaskDecided", decision={"v": 1, "task": "t", "rule": QUORUM, **decision}, trust=trust)
    assert words in told.lines()[-1]


@pytest.mark.parametrize(
    ("join", "words"),
    [
        (
            {"kind": "vote", "order": [2], "votes": [0, 2], "tied": [2, 3]},
            "[2] won with 2 votes; as many votes: 2, 3",
        ),
        ({"kind": "rank", "order": [2, 0]}, "the best first: 2, 0"),
        (
            {"kind": "all", "order": [0, 1], "missing": [2], "partial": True},
            "joined: 2 results; missing: 2; partial",
        ),
        (
            {"kind": "all", "order": [0], "defaulted": [0], "closed": True},
            "by default: 0; the time was running out",
        ),
        ({"kind": "all", "order": [0], "missing": list(range(1, 90))}, "11, 12 and 77 more"),
    ],
)
def test_every_join_has_words(told: Told, join: dict[str, Any], words: str) -> None:
    told.plain("t")
    told("job", "StepJoined", step="solve", **join)
    assert words in told.lines()[-1]


def test_an_integrator_stands_below_its_step(told: Told) -> None:
    told.plain("t", index=0)
    told.task("i", judging={"kind": "integrator"})
    told.run("i", 1, "e2")
    told("i", "TaskSucceeded", attempt=1)
    assert told.lines()[1:] == [
        "solve  solver@1.0.0",
        "[0] succeeded  laptop  1.00 s",
        "integrator solver@1.0.0 succeeded  desk  1.00 s",
    ]


def test_of_a_large_fork_what_failed_and_what_runs_is_drawn_and_the_rest_is_counted(told: Told) -> None:
    for index in range(2_000):
        told.plain(f"t{index}", index=index)
    told.task("bad", index=2_000)
    told("bad", "TaskFailed", code="trap")
    told.task("busy", index=2_001)
    told("busy", "TaskAssigned", attempt=1, executor="e2", session="s")
    told.task("again", index=2_002)
    told("again", "TaskAssigned", attempt=1, executor="e2", session="s")
    told("again", "AttemptFailed", attempt=1, code="lost")
    told.run("again", 2)
    told("again", "TaskSucceeded", attempt=2)
    lines = told.lines(limit=4)
    assert lines[1] == "solve  solver@1.0.0   1 active 2001 succeeded 1 failed"
    heads = [line.split("]")[0] for line in lines if line.startswith("[")]
    assert heads == ["[0", "[2000", "[2001", "[2002"]
    assert lines[-1] == "and 1999 more"
    assert len(lines) < 12


def test_of_a_large_fork_what_was_disputed_is_drawn(told: Told) -> None:
    for index in range(100):
        told.task(f"t{index}", index=index, replicas=2)
        told.run(f"t{index}", 1)
        told.run(f"t{index}", 2)
        keys = ("a", "b") if index in (40, 70) else ("a", "a")
        candidates = [{"attempt": n, "executor": "e1", "key": key} for n, key in enumerate(keys, 1)]
        record = {"v": 1, "task": f"t{index}", "rule": QUORUM, "outcome": "decided", "winner": 1, "votes": [1]}
        told(f"t{index}", "TaskDecided", decision={**record, "candidates": candidates})
        told(f"t{index}", "TaskSucceeded", attempt=1)
    heads = [line.split("]")[0] for line in told.lines(limit=3) if line.startswith("[")]
    assert heads == ["[0", "[40", "[70"]


def test_of_many_attempts_and_judges_of_a_task_the_first_are_drawn(told: Told) -> None:
    told.task("t", replicas=40)
    for attempt in range(1, 41):
        told.run("t", attempt)
    for attempt in range(1, 41):
        told.critic(f"c{attempt}", "t", [attempt], {"score": 1})
    lines = told.lines()
    assert "and 28 more attempts" in lines and "and 28 more judges" in lines
    assert len(lines) < 32


def test_forked_tasks_stand_below_the_one_that_forked_them(told: Told) -> None:
    told.plain("root")
    for index in range(7):
        told.plain(f"child{index}", index=index, parent="root")
    lines = told.lines(limit=3)
    assert lines[1] == "solve  solver@1.0.0   8 succeeded"
    assert lines[3:] == [*(f"[{n}] solver@1.0.0 succeeded  laptop  1.00 s" for n in range(3)), "and 4 more"]


def test_details_tell_what_a_table_does_not_and_nothing_where_all_went_as_planned(told: Told) -> None:
    told.plain("t", index=0)
    assert Drawing(told.tracker, NAMES, 5).details() is None
    told.task("bad", index=1)
    told("bad", "TaskAssigned", attempt=1, executor="e2", session="s")
    told("bad", "AttemptFailed", attempt=1, code="trap")
    told("bad", "TaskFailed", code="trap")
    told.task("judged", index=2, replicas=1)
    told.run("judged", 1)
    lines = drawn(Drawing(told.tracker, NAMES, 5).details())
    assert [line.split(" ")[0] for line in lines] == ["solve", "[1]", "#1", "[2]", "#1"]


def test_programs_get_the_whole_tree(told: Told) -> None:
    told.task("t", replicas=1, index=0)
    told.run("t", 1)
    told.critic("c", "t", [1], {"score": 0.5})
    told.plain("child", parent="t", index=0)
    told("job", "StepJoined", step="solve", kind="all", order=[0])
    (step,) = tree_json("job", told.tracker, NAMES, True)["steps"]
    (task,) = step["tasks"]
    assert (task["task_id"], task["replicas"], task["state"]) == ("t", 1, "active")
    assert (task["history"][0]["name"], task["history"][0]["score"]) == ("laptop", 0.5)
    assert [(judge["task_id"], judge["verdict"]) for judge in task["judges"]] == [("c", {"score": 0.5})]
    assert [child["task_id"] for child in task["children"]] == ["child"]
    assert step["join"]["order"] == [0] and step["join_words"] == "joined: 1 results"


def test_the_live_view_says_first_how_far_it_is_and_fits_the_tree_below() -> None:
    view = JobView("name id", NAMES)
    view.apply({"position": 1, "stream": "job", "type": "JobSubmitted", "ts_us": 1, "data": {}})
    created = {"job": "job", "step": "solve", "agent": "a@1.0.0", "input": {"inline": 1}, "replicas": 2}
    view.apply({"position": 2, "stream": "t", "type": "TaskCreated", "ts_us": 2, "data": created})
    assigned = {"attempt": 1, "executor": "e1", "session": "s"}
    view.apply({"position": 3, "stream": "t", "type": "TaskAssigned", "ts_us": 3, "data": assigned})
    lines = drawn(view)
    assert lines[0].startswith("name id   0/1 tasks")
    assert lines[1] == "laptop runs 1"
    assert lines[2:4] == ["solve  a@1.0.0", "task active"]
    assert lines[4].startswith("#1 laptop runs")


def test_what_a_task_waits_for_does_not_end_at_the_edge_of_the_terminal() -> None:
    view = JobView("name id", NAMES)
    view.lacks = "solve waits for an executor that may run it: none is there (laptop is drained)"
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, color_system=None, width=40, soft_wrap=True)
    with Live(view, console=console, auto_refresh=False):
        pass
    assert "laptop is drained" in " ".join(screen.getvalue().split())


def test_a_decision_is_told_with_places_votes_and_judges(
    capsys: pytest.CaptureFixture[str],
) -> None:
    place = {"executor": "e1", "name": "laptop", "device": "d" * 20, "owner": "o1"}
    unknown = {"executor": "e" * 20, "name": "", "device": "", "owner": "o" * 20}
    print_decision(
        {
            "task": "id-of-the-task",
            "step": "solve",
            "index": 4,
            "rule_words": "2 of 3 [results]",
            "outcome": "decided",
            "reason": "",
            "winner": 2,
            "votes": [2, 3],
            "trust": 0,
            "spent": 1,
            "coming": 3,
            "gone": 1,
            "candidates": [
                candidate(1, place, 0.25, False, "the test did not pass", []),
                candidate(2, place, 0.5, True, "", [2, 3]),
                candidate(3, unknown, None, None, "", [2, 3]),
            ],
            "running": [{"attempt": 4, **unknown}],
            "pairs": [{"a": 1, "b": 2, "equal": False}],
            "judges": [
                {"kind": "critic", "agent": "c@1.0.0", "task": "j", "judged": [1, 2], "by": {"attempt": 1, **place}}
            ],
            "self_judged": [{"agent": "c@1.0.0", "attempt": 2}],
        },
        {"o1": "Ada"},
    )
    said = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in said.splitlines()]
    assert lines[:3] == ["solve[4] id-of-the-task", "decided: #2 with 2 votes (#2 #3)", "rule: 2 of 3 [results]"]
    assert "#1 laptop dddddddddddd Ada aaaaaaaaaaaa 0.25 failed the test did not pass" in lines
    assert "#2 laptop dddddddddddd Ada aaaaaaaaaaaa 0.5 passed the winner #2 #3" in lines
    assert "#3 eeeeeeee oooooooo aaaaaaaaaaaa voted for it #2 #3" in lines
    assert "#4 eeeeeeee oooooooo ran, and was cancelled" in lines
    assert "critic c@1.0.0 #1 #2 laptop dddddddddddd Ada j" in lines
    assert "pairs: #1 ≠ #2" in lines
    assert "c@1.0.0 judged attempt #2 where it had run, which `distinct: none` allows" in lines
    assert "1 more ended without a result" in lines and "2 more were planned and had no executor yet" in lines
    assert "1 more were planned, and no executor was left for them: some were revoked" in lines


def candidate(
    attempt: int, place: dict[str, str], score: float | None, passed: bool | None, why_not: str, votes: list[int]
) -> dict[str, Any]:
    said = {"score": score, "passed": passed, "valid": not why_not, "why_not": why_not, "votes": votes}
    return {"attempt": attempt, **place, "digest": "sha256:" + "a" * 64, **said}
