"""What a step makes of its results: tasks that fail and are left out, ranks, votes, integrators."""

from typing import Any

import msgspec
import pytest
from hive_common.contracts import events, values
from hive_common.contracts.events import Child, StepJoined
from hive_common.contracts.limits import TASK_INPUT_BYTES_MAX
from hive_common.contracts.values import Value
from hive_common.kernel.errors import CorruptLog, InvalidArgument
from hive_scheduler.domain import job as jobs
from hive_scheduler.domain.joining import PAIRED_MAX, VOTES_MAX

from .joins import JOB, Fails, Play, fork, integrated

OUTPUT = "${tasks.work.output}"


def play(step: dict[str, Any], *answers: Any, output: Any = OUTPUT, **fields: Any) -> Play:
    """Let the tasks of a step answer, the last one first: no join depends on the order."""
    played = Play(step, output=output, **fields)
    for index in reversed(range(len(answers))):
        played.run(played.task("work", index), answers[index])
    return played


# --- on_failure ---


def test_a_step_without_the_words_is_joined_by_no_event() -> None:
    played = play(fork(), 1, 2, 3)
    assert played.output() == [1, 2, 3]
    assert not any(isinstance(event, StepJoined) for _, event in played.log)


def test_what_fails_is_left_out() -> None:
    played = play(fork(on_failure="skip"), 1, Fails("timeout"), 3)
    assert played.output() == [1, 3]
    assert played.joined("work") == StepJoined("work", "all", order=(0, 2), missing=(1,), partial=True)


def test_or_has_the_default_in_its_place() -> None:
    played = play(fork(on_failure="default", default={"none": True}), 1, Fails(), 3)
    assert played.output() == [1, {"none": True}, 3]
    assert played.joined("work") == StepJoined("work", "all", order=(0, 1, 2), defaulted=(1,), partial=True)


@pytest.mark.parametrize(("words", "output"), [({}, None), ({"on_failure": "default", "default": 7}, 7)])
def test_a_single_task_that_fails_gives_null_or_the_default(words: dict[str, Any], output: Any) -> None:
    after = {"id": "after", "needs": ["work"], "input": {"from": OUTPUT}}
    played = Play({"id": "work", "on_failure": "skip", **words}, after, output="${tasks.after.output}")
    played.run(played.task("work"), Fails())
    assert played.given(played.task("after")) == {"from": output}
    played.run(played.task("after"), "done")
    assert played.output() == "done"


def test_a_step_that_tolerates_and_whose_task_succeeds_passes_it_on() -> None:
    played = play({"id": "work", "on_failure": "skip"}, {"n": 1})
    assert played.output() == {"n": 1}
    assert played.joined("work") == StepJoined("work", "all", order=(0,))


def test_a_task_whose_input_cannot_be_made_is_left_out_like_any_that_fails() -> None:
    first = {"id": "first"}
    step = {"id": "work", "needs": ["first"], "fork": "${tasks.first.output}", "on_failure": "skip"}
    played = Play(first, {**step, "input": "${item.n}"}, output=OUTPUT)
    played.run(played.task("first"), [{"n": 1}, {}, {"n": 3}])
    assert [one.status for one in played.job.steps["work"].tasks] == ["ready", "failed", "ready"]
    played.run(played.task("work", 0), 1)
    played.run(played.task("work", 2), 3)
    assert played.output() == [1, 3]


def test_what_needs_the_step_waits_until_all_of_it_has_ended() -> None:
    after = {"id": "after", "needs": ["work"], "input": {"all": OUTPUT}}
    played = Play(fork(2, on_failure="skip"), after)
    played.run(played.task("work", 0), Fails())
    assert played.task("after").status == "blocked"
    played.run(played.task("work", 1), 1)
    assert played.given(played.task("after")) == {"all": [1]}


# --- minimum ---


def test_too_few_results_fail_the_job_as_soon_as_that_is_known() -> None:
    played = Play(fork(4, on_failure="skip", minimum=3), output=OUTPUT)
    played.run(played.task("work", 3), 1)
    played.run(played.task("work", 0), Fails())
    assert played.job.end is None
    played.run(played.task("work", 1), Fails())
    code, message = played.failure()
    assert code == "too_few_results"
    assert message == "task `work`: 1 of 4 succeeded (2 failed), and at least 3 had to"
    assert played.task("work", 2).status == "cancelled"


def test_a_crash_between_the_cancels_and_the_end_changes_nothing_about_why() -> None:
    played = Play(fork(4, on_failure="skip", minimum=4), fork(2) | {"id": "other"})
    played.attempt(played.task("work", 0), Fails())
    played.advance(most=2)
    assert played.job.end is None
    assert played.job.aborted
    played.crash()
    played.advance()
    assert played.failure()[0] == "too_few_results"
    assert "task `work`: 0 of 4 succeeded" in played.failure()[1]


def test_an_empty_fork_has_not_the_minimum() -> None:
    with pytest.raises(InvalidArgument, match=r"tasks\[0\].minimum: 2 tasks have to succeed, and the fork has 1"):
        Play(fork(1, minimum=2))
    step = {"id": "work", "needs": ["first"], "fork": "${tasks.first.output}", "minimum": 1}
    played = Play({"id": "first"}, step)
    played.run(played.task("first"), [])
    assert played.failure() == ("invalid_fork", "tasks[1].minimum: 1 tasks have to succeed, and the fork has 0")


# --- rank ---


CRITIC = {"critic": {"agent": "critic@1"}}


def score(played: Play, step: str, *scores: float) -> None:
    for judge, given in zip(list(played.job.steps[step].judges), scores, strict=True):
        played.run(judge, {"score": given})


def test_results_are_ranked_by_the_critics_scores_and_cut() -> None:
    step = fork(4, join={"rank": {"top": 2}}, verify=CRITIC, on_failure="skip")
    played = Play(step, output=OUTPUT)
    for index, answer in enumerate(["a", "b", "c", Fails()]):
        played.run(played.task("work", index), answer)
    score(played, "work", 0.2, 0.9, 0.9)
    assert played.output() == ["b", "c"]
    assert played.joined("work") == StepJoined("work", "rank", order=(1, 2), missing=(3,), partial=True)


def test_of_a_single_task_that_keeps_all_the_attempts_are_ranked() -> None:
    step = {"id": "work", "speculate": {"replicas": 3, "keep": "all", "distinct": "none"}}
    played = Play({**step, "join": "rank", "verify": CRITIC}, output=OUTPUT)
    for answer in ("a", "b", "c"):
        played.run(played.task("work"), answer)
    score(played, "work", 0.2, 0.9, 0.5)
    assert played.output() == ["b", "c", "a"]
    assert played.joined("work").order == (2, 3, 1)


# --- vote ---


def test_what_most_results_are_equal_to_is_the_output() -> None:
    played = play(fork(5, join="vote"), {"x": 1, "y": 2}, 7, {"y": 2, "x": 1.0}, 7.5, 8)
    assert played.output() == {"x": 1, "y": 2}
    joined = played.joined("work")
    assert (joined.kind, joined.by, joined.order, joined.votes, joined.tied) == ("vote", "json", (0,), (0, 2), ())


def test_a_tie_is_recorded_and_the_first_in_the_fork_wins() -> None:
    played = play(fork(4, join="vote"), "b", "a", "a", "b")
    assert played.output() == "b"
    assert played.joined("work").tied == (0, 1)


def test_numbers_are_equal_within_a_tolerance_and_bytes_where_they_have_to_be_the_same() -> None:
    within = {"vote": {"equal": {"numeric": {"absolute": 0.1}}}}
    played = play(fork(3, join=within), 1.0, 2.0, 2.05)
    assert played.output() == 2.0
    assert played.joined("work").by == '{"numeric":{"absolute":0.1}}'
    played = play(fork(3, join={"vote": {"equal": "exact"}}), 1, 1.0, 1.0)
    assert played.output() == 1.0
    assert played.joined("work").votes == (1, 2)


def test_who_fails_does_not_vote_and_neither_does_a_default() -> None:
    played = play(fork(3, join="vote", on_failure="default", default=0), Fails(), Fails(), 1)
    assert played.output() == 1
    assert played.joined("work").votes == (2,)
    played = play(fork(2, join="vote", on_failure="default", default=0), Fails(), Fails())
    assert played.output() == 0
    played = play(fork(2, join="vote", on_failure="skip"), Fails(), Fails())
    assert played.failure() == (
        "too_few_results",
        "task `work`: 0 of 2 succeeded (2 failed), and at least 1 had to",
    )


def test_results_that_are_blobs_are_fetched_together_before_they_are_counted() -> None:
    step = fork(3, join="vote")
    played = Play(step, output=OUTPUT)
    for text in (b'"large"', b' "large"', b'"other"'):
        played.store = {**played.store, values.digest_of(text): text}
    for index, digest in enumerate(played.store):
        played.attempt(played.task("work", index), Value(digest=digest, size_bytes=10))
    with pytest.raises(jobs.BlobsNeeded) as caught:
        list(jobs.due(played.job, 0, played.evaluator()))
    assert caught.value.load == frozenset(played.store)
    played.advance()
    assert played.joined("work").votes == (0, 1)
    # The winner is passed on without being looked at.
    end = played.job.end
    assert isinstance(end, events.JobSucceeded)
    assert end.output.digest == next(iter(played.store))


def test_votes_are_of_distinct_devices_where_replicas_have_to_be() -> None:
    for distinct, winner in (("device", "b"), ("none", "a")):
        step = {"id": "work", "speculate": {"replicas": 4, "keep": "all", "distinct": distinct}, "join": "vote"}
        played = Play(step, output=OUTPUT)
        for answer, executor in (("a", "x"), ("a", "x"), ("a", "x"), ("b", "y")):
            played.run(played.task("work"), answer, executor)
        # One device, one vote: it is a tie then, and the first attempt wins.
        joined = played.joined("work")
        assert joined.votes == ((1,) if distinct == "device" else (1, 2, 3))
        assert joined.tied == ((1, 4) if distinct == "device" else ())
        assert played.output() == "a", winner


def test_a_vote_is_bounded() -> None:
    for most, equal in ((VOTES_MAX, "json"), (PAIRED_MAX, {"numeric": {"absolute": 1}})):
        step = {"id": "work", "fork": "${input}", "input": "${item}", "join": {"vote": {"equal": equal}}}
        Play(step, given=list(range(most)))
        with pytest.raises(
            InvalidArgument, match=f"{most + 1} results would be voted over; expected {most} at most"
        ):
            Play(step, given=list(range(most + 1)))


@pytest.mark.parametrize("equal", [{"critic": {"agent": "same@1"}}, {"embedding": {"min": 0.9, "agent": "v@1"}}])
def test_equality_that_nobody_can_tell_of_results_of_several_tasks_is_refused(equal: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        Play(fork(join={"vote": {"equal": equal}}))
    assert caught.value.fields["path"] == f"tasks[0].join.vote.equal.{next(iter(equal))}"


# --- integrator ---


def test_an_integrator_is_given_all_results_in_the_order_of_the_fork() -> None:
    played = play(integrated(2), {"n": 1}, {"n": 2}, given={"question": "?"})
    integrator = played.integrator("work")
    assert (integrator.status, integrator.agent, integrator.step) == ("ready", "sum@1", "work")
    assert played.given(integrator) == {
        "input": {"question": "?"},
        "results": [
            {"index": 0, "status": "succeeded", "value": {"n": 1}},
            {"index": 1, "status": "succeeded", "value": {"n": 2}},
        ],
        "partial": False,
        "succeeded": 2,
        "size": 2,
    }
    assert played.job.end is None
    played.run(integrator, {"sum": 3})
    assert played.output() == {"sum": 3}
    assert played.joined("work") == StepJoined("work", "integrator", order=(0, 1), task=integrator.id)


def test_it_is_told_what_failed_what_was_scored_and_what_stands_in_its_place() -> None:
    step = integrated(3, on_failure="default", default=0, verify=CRITIC)
    played = Play(step, output=OUTPUT)
    for index, answer in enumerate(["a", Fails("timeout"), "c"]):
        played.run(played.task("work", index), answer)
    score(played, "work", 0.25, 0.5)
    given = played.given(played.integrator("work"))
    assert given["results"] == [
        {"index": 0, "status": "succeeded", "value": "a", "score": 0.25},
        {"index": 1, "status": "default", "value": 0, "code": "timeout"},
        {"index": 2, "status": "succeeded", "value": "c", "score": 0.5},
    ]
    assert (given["partial"], given["succeeded"], given["size"]) == (True, 2, 3)


def test_attempts_of_a_single_task_go_to_it_by_their_numbers() -> None:
    step = {"id": "work", "speculate": {"replicas": 3, "keep": "all", "distinct": "none"}}
    played = Play({**step, "join": {"integrator": {"agent": "sum@1"}}}, output=OUTPUT)
    for answer in ("a", Fails(), "c"):
        played.run(played.task("work"), answer)
    given = played.given(played.integrator("work"))
    assert given["results"] == [
        {"index": 1, "status": "succeeded", "value": "a"},
        {"index": 2, "status": "failed"},
        {"index": 3, "status": "succeeded", "value": "c"},
    ]
    assert (given["partial"], given["succeeded"], given["size"]) == (True, 2, 3)
    played.run(played.integrator("work"), "ac")
    assert played.output() == "ac"


def test_it_waits_until_no_judge_of_its_step_is_at_it_any_more() -> None:
    played = Play(integrated(2, verify=CRITIC))
    for index in range(2):
        played.run(played.task("work", index), index)
    state = played.job.steps["work"]
    played.run(state.judges[0], {"score": 1})
    assert state.joined is None
    played.run(state.judges[1], {"score": 1})
    assert state.integrator is not None


def test_its_failure_fails_the_job_whatever_the_step_says_of_its_tasks() -> None:
    played = play(integrated(2, on_failure="skip"), 1, 2)
    played.run(played.integrator("work"), Fails("timeout"))
    end = played.job.end
    assert isinstance(end, events.JobFailed)
    assert (end.code, end.task) == ("timeout", played.integrator("work").id)


def test_it_is_tried_again_as_often_as_the_tasks_of_its_step() -> None:
    played = play(integrated(1, retry={"max_attempts": 2, "backoff": "0ms"}), 1)
    played.run(played.integrator("work"), Fails())
    assert played.integrator("work").status == "ready"
    played.run(played.integrator("work"), "at last")
    assert played.output() == "at last"


def test_what_is_too_large_for_it_fails_the_job_and_says_so() -> None:
    played = Play(integrated(2), output=OUTPUT)
    size = TASK_INPUT_BYTES_MAX // 2 + 1
    for index in range(2):
        played.run(played.task("work", index), Value(digest="sha256:" + "0" * 64, size_bytes=size))
    code, message = played.failure()
    assert code == "invalid_input"
    assert message.startswith("what sum@1 (integrator of `work`) is given: has 67108")
    # It stands in the log, and nothing was fetched for it.
    assert played.integrator("work").failure is not None
    assert not played.blobs


def test_large_results_reach_it_as_a_blob() -> None:
    text = values.encode_json("x" * 400_000)
    played = Play(integrated(1), output=OUTPUT)
    played.store = {values.digest_of(text): text}
    played.run(played.task("work"), Value(digest=values.digest_of(text), size_bytes=len(text)))
    integrator = played.integrator("work")
    assert integrator.input is not None
    assert integrator.input.digest is not None
    assert played.given(integrator)["results"][0]["value"] == "x" * 400_000


def test_what_is_no_json_does_not_reach_it() -> None:
    played = Play(integrated(1), output=OUTPUT)
    played.store = {values.digest_of(b"{]"): b"{]"}
    played.run(played.task("work"), Value(digest=values.digest_of(b"{]"), size_bytes=2))
    assert played.failure()[0] == "invalid_input"


# --- forks over forks, and what tasks fork ---


def test_a_fork_goes_over_what_each_task_of_an_earlier_fork_gave() -> None:
    plan = {"id": "plan", "fork": ["x", "y"], "input": "${item}"}
    nested = {
        "id": "work",
        "needs": ["plan"],
        "fork": "${tasks.plan.output[].parts[]}",
        "input": {"part": "${item}"},
    }
    played = Play(plan, nested, output=OUTPUT)
    played.run(played.task("plan", 0), {"parts": [1, 2]})
    played.run(played.task("plan", 1), {"parts": [3]})
    assert [played.given(one) for one in played.job.steps["work"].tasks] == [{"part": 1}, {"part": 2}, {"part": 3}]
    for index in range(3):
        played.run(played.task("work", index), index * 10)
    assert played.output() == [0, 10, 20]


def test_a_fork_over_what_was_left_out_goes_over_the_rest() -> None:
    plan = {"id": "plan", "fork": [0, 1], "input": "${item}", "on_failure": "skip"}
    nested = {"id": "work", "needs": ["plan"], "fork": "${tasks.plan.output[].parts[]}", "input": "${item}"}
    played = Play(plan, nested)
    played.run(played.task("plan", 0), Fails())
    played.run(played.task("plan", 1), {"parts": [3]})
    assert [played.given(one) for one in played.job.steps["work"].tasks] == [3]


@pytest.mark.parametrize(
    ("words", "forked"),
    [
        ({"on_failure": "skip"}, [{"agent": "a@1", "output": "two"}]),
        (
            {"on_failure": "default", "default": 0},
            [{"agent": "a@1", "output": 0}, {"agent": "a@1", "output": "two"}],
        ),
    ],
)
def test_tasks_that_tasks_fork_are_waited_for_and_may_fail_as_the_step_says(
    words: dict[str, Any], forked: list[Any]
) -> None:
    played = Play({"id": "work", **words}, output={"own": OUTPUT, "forked": "${tasks.work.forked}"})
    children = tuple(Child("a@1", msgspec.Raw(text)) for text in (b"1", b"2"))
    played.run(played.task("work"), "parent", forks=children)
    one, two = played.job.steps["work"].children
    played.run(one, Fails())
    assert played.job.steps["work"].joined is None
    played.run(two, "two")
    assert played.output() == {"own": "parent", "forked": forked}
    assert played.joined("work") == StepJoined("work", "all", order=(0,), partial=True)


# --- the log ---


def test_a_step_is_joined_once_and_not_before_its_tasks_have_ended() -> None:
    played = play(integrated(2), 1)
    assert played.task("work", 1).status == "ready"
    with pytest.raises(CorruptLog):
        jobs.evolve(played.replay(), JOB, StepJoined("work", "integrator"))
    played.run(played.task("work", 1), 2)
    joined = played.joined("work")
    for step in (joined, StepJoined("nobody", "all")):
        with pytest.raises(CorruptLog):
            jobs.evolve(played.replay(), JOB, step)
