"""What the machines that there are can never do is refused, with the path in the job file and what would help."""

import msgspec
import pytest
from hive_common.contracts.events import AgentRef, Capabilities
from hive_common.kernel.errors import InvalidArgument
from hive_scheduler.domain.feasibility import check_places
from hive_scheduler.domain.jobfile import parse_job
from hive_scheduler.domain.placement import Device
from hive_scheduler.resolution import named_agents

AGENTS = {
    f"{name}@1.0.0": AgentRef(name, "1.0.0", "sha256:", runtime, 64 << 20, 1_000, 1)
    for name, runtime in (("do", "python"), ("judge", "python"), ("native", "component"))
}


def machine(name, device="", tier="worker", labels=None, owner="me", runtimes=("python",), **more):
    capabilities = Capabilities(
        "linux", "amd64", 4, 1 << 30, 2, runtimes, labels=labels or {}, device=device or name, tier=tier
    )
    return Device(name, name, owner, capabilities, 0, 0, online=False, **more)


def check(devices, pin="any", **words):
    task = {"id": "a", "agent": "do@1.0.0", **words}
    document = {"apiVersion": "hive/v1", "kind": "Job", "name": "j", "tasks": [task]}
    check_places(parse_job(msgspec.json.encode(document)), AGENTS, "me", pin, devices)


def refused(devices, **words):
    with pytest.raises(InvalidArgument) as caught:
        check(devices, **words)
    assert caught.value.message.startswith(caught.value.fields["path"] + ": ")
    return caught.value.fields["path"], caught.value.message


QUORUM = {"quorum": {"k": 2, "of": 3}}
JUDGE = {"agent": "judge@1.0.0"}


def test_plain_jobs_wait_for_machines_as_ever():
    check([])
    check([], fork=[1, 2], join="all")


def test_a_quorum_needs_as_many_devices_as_results_and_the_message_says_what_helps():
    check([machine("a"), machine("b"), machine("c")], verify=QUORUM)
    two = [machine("a"), machine("a2", "a"), machine("b"), machine("c", revoked=True), machine("d", killed=True)]
    path, message = refused(two, verify=QUORUM)
    assert path == "tasks[0].verify.quorum.of"
    assert "3 results of do@1.0.0" in message
    assert "3 distinct devices, and there are 2" in message
    assert "1 killed, 1 revoked" in message
    assert "hive executor token" in message
    assert "distinct: none" in message
    check(two, verify=QUORUM, speculate={"distinct": "executor"})
    check([machine("a")], verify=QUORUM, speculate={"distinct": "none"})


def test_replicas_are_refused_at_the_word_that_keeps_them_apart():
    one = [machine("a"), machine("b", owner="you", standing="known")]
    check(one, speculate={"replicas": 2, "distinct": "owner"})
    assert refused(one, speculate={"replicas": 3, "distinct": "owner"})[0] == "tasks[0].speculate.distinct"
    assert "there is 1" in refused(one[:1], speculate={"replicas": 2})[1]


@pytest.mark.parametrize(
    ("words", "path", "needed"),
    [
        ({"verify": {"critic": JUDGE}}, "tasks[0].verify.critic.agent", 2),
        ({"verify": {"test": JUDGE}}, "tasks[0].verify.test.agent", 2),
        ({"verify": {"quorum": {"k": 2, "of": 2, "equal": {"critic": JUDGE}}}}, "tasks[0].verify.quorum.equal", 3),
        (
            {"verify": {"quorum": {"k": 2, "of": 3, "on_none": "escalate"}, "senior": JUDGE}},
            "tasks[0].verify.senior.agent",
            4,
        ),
        ({"verify": {**QUORUM, "critic": JUDGE}}, "tasks[0].verify.quorum.of", 3),
    ],
)
def test_a_judge_needs_one_more_machine_than_it_judges_the_work_of(words, path, needed):
    machines = [machine(str(number)) for number in range(needed)]
    check(machines, **words)
    found, message = refused(machines[:-1], **words)
    assert found.startswith(path)
    assert f"{needed} distinct devices" in message
    check(machines[:1], **words, speculate={"distinct": "none"})


def test_a_judge_on_a_machine_that_can_do_nothing_else_is_apart():
    judges = {"verify": {"critic": {"agent": "native@1.0.0"}}}
    check([machine("a"), machine("b", runtimes=("component",))], **judges)
    both = machine("a", runtimes=("python", "component"))
    assert refused([both], **judges)[0] == "tasks[0].verify.critic.agent"
    assert "2 runtime_missing" in refused([machine("a"), machine("b")], **judges)[1]


def test_a_vector_is_made_of_one_result_apart_from_where_that_came_from():
    equal = {"embedding": {"min": 0.9, "agent": "native@1.0.0"}}
    words = {"verify": {"quorum": {"k": 2, "of": 2, "equal": equal}}}
    both = [machine(name, runtimes=("python", "component")) for name in ("a", "b")]
    check(both, **words)
    path, message = refused([both[0], machine("b")], **words)
    assert path == "tasks[0].verify.quorum.equal.embedding.agent"
    assert "2 distinct devices, and there is 1" in message
    check([both[0]], **words, speculate={"distinct": "none"})


def test_new_machines_of_others_count_where_their_work_is_judged():
    machines = [machine("a"), machine("b", owner="you"), machine("c", owner="you")]
    check(machines, verify=QUORUM)
    with pytest.raises(InvalidArgument, match="2 new_executor"):
        check(machines, verify=QUORUM, pin="own-devices")


def test_place_counts_for_distinctness():
    machines = [machine(str(number), labels={"gpu": "yes"} if number else {}) for number in range(3)]
    check(machines, verify=QUORUM)
    assert "1 label_missing" in refused(machines, verify=QUORUM, place={"labels": {"gpu": "yes"}})[1]


@pytest.mark.parametrize(
    ("place", "path", "said"),
    [
        ({"executors": ["desktop", "laptpo"]}, "tasks[0].place.executors[1]", "expected `laptop`"),
        ({"executors": ["gone"]}, "tasks[0].place.executors[0]", "hive executor list"),
        ({"tier": "core"}, "tasks[0].place.tier", "edge, worker"),
        ({"labels": {"gpu": "yes"}}, "tasks[0].place.labels.gpu", "hive up --label gpu="),
        ({"labels": {"region": "us"}}, "tasks[0].place.labels.region", "one of eu"),
        ({"tier": "edge", "labels": {"region": "eu"}}, "tasks[0].place", "at once"),
    ],
)
def test_a_place_that_no_machine_is_is_refused(place, path, said):
    machines = [
        machine("laptop", tier="edge"),
        machine("desktop", labels={"region": "eu"}),
        machine("gone", revoked=True),
    ]
    found, message = refused(machines, place=place)
    assert found == path
    assert said in message
    check(machines, place={"tier": "edge", "executors": ["laptop"]})
    check(machines, place={"labels": {"region": "eu"}})


def test_every_agent_that_a_step_names_has_a_path_of_its_own():
    task = {
        "id": "a",
        "agent": "do@1.0.0",
        "fork": [1, 2],
        "verify": {
            "critic": {"agent": "c@1.0.0"},
            "test": {"agent": "t@1.0.0"},
            "quorum": {"k": 2, "of": 2, "equal": {"critic": {"agent": "p@1.0.0"}}, "on_none": "escalate"},
            "senior": {"agent": "s@1.0.0"},
        },
        "join": {"integrator": {"agent": "i@1.0.0"}},
    }
    document = {"apiVersion": "hive/v1", "kind": "Job", "name": "j", "tasks": [task]}
    (step,) = parse_job(msgspec.json.encode(document)).steps
    assert dict(named_agents(step)) == {
        "do@1.0.0": "tasks[0].agent",
        "c@1.0.0": "tasks[0].verify.critic.agent",
        "t@1.0.0": "tasks[0].verify.test.agent",
        "p@1.0.0": "tasks[0].verify.quorum.equal.critic.agent",
        "s@1.0.0": "tasks[0].verify.senior.agent",
        "i@1.0.0": "tasks[0].join.integrator.agent",
    }
    assert {reference for reference, _ in named_agents(step)} == step.agents
    task["verify"]["quorum"]["equal"] = {"embedding": {"min": 0.9, "agent": "v@1.0.0"}}
    (step,) = parse_job(msgspec.json.encode(document)).steps
    assert dict(named_agents(step))["v@1.0.0"] == "tasks[0].verify.quorum.equal.embedding.agent"
    assert {reference for reference, _ in named_agents(step)} == step.agents
