"""What attempts and judges ask of devices: by their job, and by where other attempts are."""

import msgspec
import pytest
from hive_common.contracts import events, values
from hive_common.contracts.events import AgentRef, Capabilities, JobSubmitted, TaskCreated
from hive_common.contracts.judgement import Producer
from hive_common.judgement.independence import conflict
from hive_scheduler.domain import job as jobs
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.jobfile import parse_job
from hive_scheduler.domain.needs import apart_from, need_of
from hive_scheduler.domain.placement import Device, Need, Where, apart_reason
from hive_scheduler.domain.task import AttemptState, created
from hypothesis import given
from hypothesis import strategies as st

GIB = 1 << 30
AGENTS = ("square", "critic", "senior", "total")


def agent(name, runtime="python"):
    return AgentRef(name, "1.0.0", f"sha256:{name}", runtime, 64 << 20, 1_000, 1)


def job_of(pin="any", **words):
    document = {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "one",
        "tasks": [{"id": "square", "agent": "square@1.0.0", "input": {}, **words}],
    }
    data = msgspec.json.encode(document)
    submitted = JobSubmitted(
        name="one",
        document=msgspec.Raw(data),
        input=values.inline(b"{}"),
        agents={f"{name}@1.0.0": agent(name) for name in AGENTS},
        request_digest="",
        deadline_us=10**12,
        pin=pin,
    )
    return JobState("job", "me", submitted, parse_job(data))


def task_of(job, replicas=0, task="t", agent="square@1.0.0", judging=None):
    created = TaskCreated("job", "square", agent, input=values.inline(b"{}"), replicas=replicas, judging=judging)
    if judging is None:
        job.steps["square"].size = 1
    jobs.evolve(job, task, created)
    return job.tasks[task]


def assign(job, number, executor, device, owner="me"):
    event = events.TaskAssigned(number, executor, "s", 1_000, device=device, owner=owner)
    jobs.evolve(job, "t", event)


def reason(need, device):
    return None if need.distinct_from is None else apart_reason(device, need.distinct_from)


def device(name, machine, owner="me", **more):
    capabilities = Capabilities("linux", "amd64", 4, 8 * GIB, 4, ("python",), device=machine)
    return Device(name, name, owner, capabilities, 4, 8 * GIB, **more)


def test_plain_tasks_of_all_jobs_of_an_owner_need_the_same():
    one, another = job_of(), job_of()
    need = need_of(one, task_of(one))
    assert need == need_of(another, task_of(another)) == Need("python", 64 << 20, owner="me")
    assert hash(need) == hash(need_of(another, another.tasks["t"]))


QUORUM = {"quorum": {"k": 2, "of": 3}}


def test_a_further_attempt_keeps_away_from_results_and_from_what_still_runs_and_not_from_what_failed():
    job = job_of(verify=QUORUM)
    task = task_of(job, replicas=3)
    assert need_of(job, task).distinct_from is None
    assign(job, 1, "a", "m1")
    assign(job, 2, "b", "m2")
    jobs.evolve(job, "t", events.AttemptSucceeded(1, values.inline(b"1")))
    need = need_of(job, task)
    assert reason(need, device("a", "m1")) == "same_executor"
    assert reason(need, device("a2", "m1")) == "same_device"
    assert reason(need, device("b2", "m2")) == "same_device"
    assert reason(need, device("c", "m3")) is None
    jobs.evolve(job, "t", events.AttemptFailed(2, "trap"))
    assert reason(need_of(job, task), device("b", "m2")) is None


@pytest.mark.parametrize(
    ("distinct", "refused"),
    [
        ("none", set()),
        ("executor", {"a"}),
        ("device", {"a", "same machine"}),
        ("owner", {"a", "same machine", "other machine"}),
    ],
)
def test_distinct_says_what_attempts_must_not_have_in_common(distinct, refused):
    job = job_of(verify=QUORUM, speculate={"distinct": distinct})
    task = task_of(job, replicas=3)
    assign(job, 1, "a", "m1")
    places = [
        device("a", "m1"),
        device("same machine", "m1"),
        device("other machine", "m2"),
        device("x", "m", "you"),
    ]
    need = need_of(job, task)
    assert {one.name for one in places if reason(need, one)} == refused


CRITIC = {**QUORUM, "critic": {"agent": "critic@1.0.0"}}
SENIOR = {"quorum": {"k": 2, "of": 2, "on_none": "escalate"}, "senior": {"agent": "senior@1.0.0"}}


def judge(job, kind, attempts, name):
    judging = events.Judging(kind, "t", attempts)
    return task_of(job, task=f"judge {kind} {attempts}", agent=f"{name}@1.0.0", judging=judging)


def test_a_critic_keeps_away_from_what_it_judges_and_from_nothing_else():
    job = job_of(verify=CRITIC)
    task_of(job, replicas=3)
    assign(job, 1, "a", "m1")
    assign(job, 2, "b", "m2")
    need = need_of(job, judge(job, "critic", (1,), "critic"))
    assert reason(need, device("a", "m1")) == "produced_what_it_judges"
    assert reason(need, device("a2", "m1")) == "same_device_as_what_it_judges"
    assert reason(need, device("b", "m2")) is None
    assert not need.low_trust
    assert not need.senior


def test_a_senior_judge_keeps_away_from_all_candidates_and_asks_for_a_high_tier():
    job = job_of(verify=SENIOR, place={"tier": "edge", "labels": {"region": "eu"}})
    task_of(job, replicas=2)
    assign(job, 1, "a", "m1")
    assign(job, 2, "b", "m2")
    need = need_of(job, judge(job, "senior", (1, 2), "senior"))
    assert [reason(need, device(name, name)) is None for name in ("a", "b", "c")] == [False, False, True]
    assert need.senior
    assert need.place == Where(labels=frozenset({("region", "eu")}))


def test_without_distinctness_a_judge_may_run_anywhere():
    job = job_of(verify=CRITIC, speculate={"distinct": "none"})
    task_of(job, replicas=3)
    assign(job, 1, "a", "m1")
    assert need_of(job, judge(job, "critic", (1,), "critic")).distinct_from is None


@pytest.mark.parametrize(
    ("words", "pin", "low"),
    [
        ({}, "any", False),
        ({"verify": QUORUM}, "any", True),
        ({"verify": QUORUM}, "own-devices", False),
        ({"verify": {"quorum": {"k": 1, "of": 2}}}, "any", False),
        ({"verify": {"test": {"agent": "critic@1.0.0"}}}, "any", True),
        ({"verify": {"critic": {"agent": "critic@1.0.0"}}}, "any", False),
    ],
)
def test_work_is_for_machines_that_nobody_knows_where_others_or_a_test_judge_it(words, pin, low):
    job = job_of(pin=pin, **words)
    assert need_of(job, task_of(job, replicas=1 if words else 0)).low_trust is low


def test_what_a_task_forked_is_judged_by_nobody_and_for_known_machines_alone():
    job = job_of(verify=QUORUM, place={"tier": "edge"})
    task_of(job, replicas=3)
    forked = TaskCreated("job", "square", "square@1.0.0", 0, values.inline(b"{}"), parent="t")
    need = need_of(job, created("child", forked))
    assert (need.low_trust, need.distinct_from, need.place) == (False, None, Where("edge"))


names = st.sampled_from(["a", "b", "c"])
producers = st.builds(Producer, st.integers(1, 9), names, st.sampled_from(["", "m1", "m2"]), names)


@given(st.sampled_from(["none", "executor", "device", "owner"]), producers, st.lists(producers, max_size=4))
def test_what_placement_refuses_a_judge_is_what_independence_refuses(distinct, place, judged):
    attempts = [AttemptState(one.executor, "s", device=one.device, owner=one.owner) for one in judged]
    apart = apart_from(distinct, attempts, judges=True)
    found = None if apart is None else apart_reason(device(place.executor, place.device, place.owner), apart)
    assert bool(found) == bool(conflict(distinct, place, judged))
    if len(judged) == 1:
        assert (found or "") == conflict(distinct, place, judged)
