"""What the storm's oracle says of judged work, against histories with one mistake each."""

import copy
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
JUROR = "juror@1.0.0"
APART = {"distinct": "executor"}
BASE = {"id": "each", "agent": "witness@1.0.0", "input": {"n": 3}}
QUORUM = {**BASE, "speculate": {**APART, "replicas": 3}, "verify": {"quorum": {"k": 2, "of": 3}}}
CRITIC = {**BASE, "speculate": {**APART, "replicas": 2}, "verify": {"critic": {"agent": JUROR, "min_score": 1}}}
HEDGED = {**BASE, "speculate": {**APART, "replicas": 2, "hedge_after": "50ms"}}
KEPT = {**BASE, "speculate": {**APART, "replicas": 3, "keep": "all"}, "join": {"vote": {"equal": "json"}}}
SUMMED = {**BASE, "fork": [3, 4], "on_failure": "skip", "join": {"integrator": {"agent": JUROR}}}
TRUTH, LIE, OTHER = "=0000000009", "=1000000009", "=2000000009"


def said(value):
    return {"inline": value, "size_bytes": 1}


def created(name, replicas=0, n=3, **more):
    data = {"job": "job", "step": "each", "agent": "witness@1.0.0", "input": said({"n": n}), **more}
    return (name, "TaskCreated", {**data, "replicas": replicas} if replicas else data)


def judge(name, kind, attempts, given=None, **more):
    judging = {"kind": kind, "task": "" if kind == "integrator" else "task", "attempts": attempts}
    data = {"job": "job", "step": "each", "agent": JUROR, "input": said(given or {}), "judging": judging, **more}
    return (name, "TaskCreated", data)


def assigned(number, executor, name="task"):
    return (name, "TaskAssigned", {"attempt": number, "executor": executor, "session": "s"})


def gave(number, answer=TRUTH, name="task", output=None):
    value = {"answer": answer} if output is None else output
    return (name, "AttemptSucceeded", {"attempt": number, "output": said(value)})


def decided(votes, gave, winner=None, outcome="decided", trust=0, running=(), **more):
    """Args: `gave` and `running` are pairs of attempts and executors, or whole candidates."""
    whole = [one if isinstance(one, dict) else {"attempt": one[0], "executor": one[1]} for one in gave]
    live = [{"attempt": number, "executor": executor} for number, executor in running]
    made = {"outcome": outcome, "votes": votes, "candidates": whole, "running": live, **more}
    if winner is not None:
        made["winner"] = winner
    return ("task", "TaskDecided", {"decision": made, "trust": trust})


def won(number, name="task"):
    return (name, "TaskSucceeded", {"attempt": number})


def alone(name, executor, output, number=1):
    """A task that one attempt does."""
    return [assigned(number, executor, name), gave(number, name=name, output=output), won(number, name)]


SUBMITTED = ("job", "JobSubmitted", {"name": "nonce"})
ENDED = ("job", "JobSucceeded", {"output": said("whatever")})
RESULTS = [assigned(1, "a"), assigned(2, "b"), assigned(3, "c"), gave(1), gave(2, LIE), gave(3)]
BY_THREE = [(1, "a"), (2, "b"), (3, "c")]
START = [SUBMITTED, created("task", 3), *RESULTS]
GOOD_QUORUM = [*START, decided([1, 3], BY_THREE, 1), won(1), ENDED]
SCORED = [{"attempt": 1, "executor": "a", "score": 0.0}, {"attempt": 2, "executor": "b", "score": 1.0}]
ASKED = [
    SUBMITTED,
    created("task", 2),
    *[assigned(1, "a"), assigned(2, "b"), gave(1, LIE), gave(2)],
    *[judge("j1", "critic", [1]), judge("j2", "critic", [2])],
]
VERDICTS = [*alone("j1", "c", {"score": 0.0}), *alone("j2", "a", {"score": 1.0})]
GOOD_CRITIC = [*ASKED, *VERDICTS, decided([2], SCORED, 2), won(2), ENDED]
HEDGE = ("task", "TaskExtended", {"attempts": 1, "reason": "hedge"})
GOOD_HEDGE = [
    *[SUBMITTED, created("task", 1), assigned(1, "a"), HEDGE, assigned(2, "b"), gave(2)],
    *[decided([2], [(2, "b")], 2, running=[(1, "a")]), won(2), ENDED],
]
VOTE = {"step": "each", "kind": "vote", "order": [1], "votes": [1, 3]}
JOINED = ("job", "StepJoined", VOTE)
GOOD_KEPT = [*START, decided([1, 2, 3], BY_THREE, outcome="kept"), won(1), JOINED, ENDED]
SUM = {"step": "each", "kind": "integrator", "order": [0], "missing": [1], "partial": True, "task": "sum"}
FAILED = [
    *[created("bad", index=1, input=said({"n": 4, "fails": 1})), assigned(1, "b", "bad")],
    *[
        ("bad", "AttemptFailed", {"attempt": 1, "code": "agent_error"}),
        ("bad", "TaskFailed", {"code": "agent_error"}),
    ],
]
TASKS = [SUBMITTED, created("task", index=0), *alone("task", "a", {"answer": TRUTH}), *FAILED]
VALUE = {"index": 0, "status": "succeeded", "value": {"answer": TRUTH}}
GIVEN = {"results": [VALUE, {"index": 1, "status": "failed"}], "partial": True, "size": 2}
TOTAL = {"count": 1, "sum": 9, "partial": True}
GOOD_SUM = [
    *[*TASKS, ("job", "StepJoined", SUM), judge("sum", "integrator", [], GIVEN)],
    *[*alone("sum", "c", TOTAL), ENDED],
]


@pytest.fixture(scope="module")
def storm():
    """The modules of the storm, which is no installed package."""
    sys.path.insert(0, str(ROOT))
    try:
        yield {
            name: importlib.import_module(f"tests.chaos.storm.{name}")
            for name in ("clients", "jury", "line", "oracle", "plan")
        }
    finally:
        sys.path.remove(str(ROOT))


@pytest.fixture
def told(storm):
    """Return a function from a step and a history to the storm's line."""

    def line(step, history, tasks=None):
        versions: dict[str, int] = {}
        events = []
        for position, (stream, kind, data) in enumerate(copy.deepcopy(history), 1):
            versions[stream] = versions.get(stream, 0) + 1
            events.append(storm["oracle"].Event(position, stream, versions[stream], kind, float(position), data))
        count = len(step["fork"]) if "fork" in step else 1
        planned = storm["plan"].Planned("nonce", {"tasks": [step]}, tasks or count, "succeeded", "whatever")
        record = storm["clients"].Record(planned, {"job"}, 1.0)
        return storm["line"].line_of(1, [record], storm["oracle"].replay(events), [], {"ok": True}, [])

    return line


def replaced(history, old, *new):
    """Return a history with something else in the place of one event, wherever that stands."""
    assert old in history
    return [one for event in history for one in (new if event == old else (event,))]


@pytest.mark.parametrize(
    ("step", "history", "counts"),
    [
        (QUORUM, GOOD_QUORUM, {"decisions": 1, "lies": 1}),
        (CRITIC, GOOD_CRITIC, {"decisions": 1, "judges": 2, "lies": 1}),
        (HEDGED, GOOD_HEDGE, {"decisions": 1, "more: hedge": 1}),
        (KEPT, GOOD_KEPT, {"decisions": 1, "joins": 1, "lies": 1}),
        (SUMMED, GOOD_SUM, {"joins": 1, "judges": 1}),
    ],
    ids=["quorum", "critic", "hedge", "kept", "integrator"],
)
def test_judged_work_as_it_should_be_has_nothing_wrong(told, step, history, counts):
    line = told(step, history)
    assert line["ok"], line
    assert {name: line["judged"].get(name, 0) for name in counts} == counts


CHOSEN, END = decided([1, 3], BY_THREE, 1), won(1)
LIED = [gave(1), gave(2, LIE), gave(3, LIE)]
SECOND = [assigned(1, "a"), assigned(2, "a"), assigned(3, "c")]
MISTAKES = {
    "a second decision": (QUORUM, replaced(GOOD_QUORUM, CHOSEN, CHOSEN, CHOSEN)),
    "no decision": (QUORUM, replaced(GOOD_QUORUM, CHOSEN)),
    "an end that is not what was decided": (QUORUM, replaced(GOOD_QUORUM, END, won(3))),
    "a failure where something was decided": (
        QUORUM,
        replaced(GOOD_QUORUM, END, ("task", "TaskFailed", {"code": "no_quorum"})),
    ),
    "an end long after its decision": (QUORUM, replaced(GOOD_QUORUM, END, HEDGE, END)),
    "a lie that has two votes": (
        QUORUM,
        [SUBMITTED, created("task", 3), *RESULTS[:3], *LIED, decided([2, 3], BY_THREE, 2), won(2), ENDED],
    ),
    "one vote where two are needed": (QUORUM, replaced(GOOD_QUORUM, CHOSEN, decided([1], BY_THREE, 1))),
    "votes that are not equal": (QUORUM, replaced(GOOD_QUORUM, CHOSEN, decided([1, 2], BY_THREE, 1))),
    "two votes of one executor": (
        QUORUM,
        [
            *[SUBMITTED, created("task", 3), *SECOND, gave(1), gave(2), gave(3, LIE)],
            *[decided([1, 2], [(1, "a"), (2, "a"), (3, "c")], 1), END, ENDED],
        ],
    ),
    "a candidate that gave nothing": (
        QUORUM,
        replaced(replaced(GOOD_QUORUM, gave(3)), CHOSEN, decided([1, 3], BY_THREE, 1)),
    ),
    "a candidate said to be of another executor": (
        QUORUM,
        replaced(GOOD_QUORUM, CHOSEN, decided([1, 3], [(1, "a"), (2, "b"), (3, "x")], 1)),
    ),
    "somebody at work who is forgotten": (HEDGED, [*GOOD_HEDGE[:6], decided([2], [(2, "b")], 2), won(2), ENDED]),
    "more attempts than are planned": (QUORUM, replaced(GOOD_QUORUM, gave(3), gave(3), assigned(4, "d"))),
    "more attempts than the words allow": (
        QUORUM,
        replaced(GOOD_QUORUM, gave(3), gave(3), ("task", "TaskExtended", {"attempts": 4, "reason": "extend"})),
    ),
    "one in place of nobody": (
        QUORUM,
        replaced(GOOD_QUORUM, gave(3), gave(3), ("task", "TaskExtended", {"attempts": 1, "reason": "lost"})),
    ),
    "a retry that nobody asked for": (
        {**QUORUM, "retry": {"max_attempts": 1}},
        [
            *[*START[:4], ("task", "AttemptFailed", {"attempt": 2, "code": "agent_error"})],
            ("task", "TaskExtended", {"attempts": 1, "reason": "retry"}),
        ],
    ),
    "a hedge that nobody asked for": (QUORUM, replaced(GOOD_QUORUM, gave(3), gave(3), HEDGE)),
    "a hedge after the result": (HEDGED, [*GOOD_HEDGE[:4], gave(1), HEDGE, *GOOD_HEDGE[4:]]),
    "trust where none was asked for": (
        QUORUM,
        [*START[:3], gave(1), decided([1], [(1, "a")], 1, trust=12), END, ENDED],
    ),
    "a task that is not judged at all": (
        QUORUM,
        [SUBMITTED, created("task"), *alone("task", "a", {"answer": TRUTH})],
    ),
    "a score that nobody gave": (
        CRITIC,
        replaced(GOOD_CRITIC, decided([2], SCORED, 2), decided([2], [SCORED[0], {**SCORED[1], "score": 0.9}], 2)),
    ),
    "a winner that did not pass": (CRITIC, [*GOOD_CRITIC[:-3], decided([1], SCORED, 1), won(1), ENDED]),
    "a winner that nobody judged": (CRITIC, [*ASKED, decided([2], [(1, "a"), (2, "b")], 2), won(2), ENDED]),
    "a judge where what it judges was made": (
        CRITIC,
        replaced(GOOD_CRITIC, assigned(1, "c", "j1"), assigned(1, "a", "j1")),
    ),
    "a judge that is asked twice": (CRITIC, [*ASKED, judge("j3", "critic", [2]), *GOOD_CRITIC[len(ASKED) :]]),
    "a judge that is asked too early": (
        CRITIC,
        [*ASKED[:2], judge("j3", "critic", [2]), *ASKED[2:7], *VERDICTS[:3], *GOOD_CRITIC[-3:]],
    ),
    "a judge after the end": (CRITIC, [*GOOD_CRITIC[:-1], judge("j3", "test", [2])]),
    "a judge of another agent": (
        CRITIC,
        replaced(GOOD_CRITIC, judge("j1", "critic", [1]), judge("j1", "critic", [1], agent="witness@1.0.0")),
    ),
    "a judge of nobody": (QUORUM, replaced(GOOD_QUORUM, ENDED, judge("j1", "critic", [1]))),
    "kept is less than there is": (
        KEPT,
        replaced(GOOD_KEPT, GOOD_KEPT[-4], decided([1, 3], BY_THREE, outcome="kept")),
    ),
    "no join": (KEPT, replaced(GOOD_KEPT, JOINED)),
    "a second join": (KEPT, replaced(GOOD_KEPT, JOINED, JOINED, JOINED)),
    "a join that nobody asked for": (QUORUM, replaced(GOOD_QUORUM, ENDED, JOINED, ENDED)),
    "the fewer votes win": (
        KEPT,
        replaced(GOOD_KEPT, JOINED, ("job", "StepJoined", {**VOTE, "order": [2], "votes": [2]})),
    ),
    "a join before its tasks have ended": (KEPT, [*GOOD_KEPT[:-3], JOINED, won(1), ENDED]),
    "a join without a result that succeeded": (
        SUMMED,
        replaced(
            GOOD_SUM, ("job", "StepJoined", SUM), ("job", "StepJoined", {**SUM, "order": [], "missing": [0, 1]})
        ),
    ),
    "a join that is not said to be partial": (
        SUMMED,
        replaced(GOOD_SUM, ("job", "StepJoined", SUM), ("job", "StepJoined", {**SUM, "partial": False})),
    ),
    "fewer than the minimum": ({**SUMMED, "minimum": 2}, GOOD_SUM),
    "an integrator that is given less": (
        SUMMED,
        replaced(
            GOOD_SUM,
            judge("sum", "integrator", [], GIVEN),
            judge("sum", "integrator", [], {**GIVEN, "results": []}),
        ),
    ),
    "an integrator that is given something else": (
        SUMMED,
        replaced(
            GOOD_SUM,
            judge("sum", "integrator", [], GIVEN),
            judge("sum", "integrator", [], {**GIVEN, "results": [{**VALUE, "value": {"answer": LIE}}]}),
        ),
    ),
    "no integrator": (SUMMED, [*TASKS, ("job", "StepJoined", SUM), ENDED]),
    "an output that is not of what was given": (
        SUMMED,
        replaced(GOOD_SUM, gave(1, name="sum", output=TOTAL), gave(1, name="sum", output={**TOTAL, "sum": 8})),
    ),
    "more tasks than the fork has": (QUORUM, [*GOOD_QUORUM[:-1], created("task-2", 3)]),
}


@pytest.mark.parametrize(("step", "history"), list(MISTAKES.values()), ids=list(MISTAKES))
def test_the_jury_finds(told, step, history):
    line = told(step, history)
    assert line["unjust"] > 0, line
    assert not line["ok"]


def test_a_lie_that_a_quorum_of_liars_would_take_is_found_by_its_number_alone(told):
    """Whoever has the votes: what wins has to be true."""
    line = told(*MISTAKES["a lie that has two votes"])
    assert line["unjust"] == 1
    assert "a lie" in line["problems"][0]


def test_devices_may_take_results_away_and_nothing_else_may(told):
    none = ("task", "TaskFailed", {"code": "no_quorum"})
    start = [SUBMITTED, created("task", 3), *RESULTS[:3], gave(1), gave(2, LIE)]
    lost = ("task", "AttemptLost", {"attempt": 3, "reason": "lease_expired"})
    failed = ("job", "JobFailed", {"code": "no_quorum"})
    by_two = [(1, "a"), (2, "b")]
    taken = [*start, lost, decided([], by_two, outcome="failed", spent=1), none, failed]
    assert told(QUORUM, taken)["ok"]
    given_up = [*start, gave(3, OTHER), decided([], BY_THREE, outcome="failed"), none, failed]
    line = told(QUORUM, given_up)
    assert line["unjust"] == 0
    assert "no_quorum" in line["problems"][0]
