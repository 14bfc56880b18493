"""Tasks that tasks fork: resolved at submit, checked at the report, made once, with no more than their parents."""

import asyncio
import time

import msgspec
import psycopg
import pytest
from hive_common.contracts.events import Child
from hive_common.contracts.limits import FORK_STAGED_BYTES_MAX
from hive_common.contracts.permissions import ForkPermission, HttpPermission, ModelPermission, Permissions
from hive_common.kernel.clock import SystemClock
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from hive_common.permissions import parse
from hive_common.permissions.grants import Grant
from hive_common.permissions.tokens import Verifier, public_key
from hive_proto.jobs.v1 import jobs_pb2
from hive_scheduler import engine
from hive_scheduler.domain import job as jobs
from hive_scheduler.domain.job import snapshot
from hive_scheduler.recovery import PostgresOpenJobs, recover, replay
from hive_scheduler.submission import Specs

from .conftest import TOKEN_KEY, agent, succeeded

FORKS_SQUARE = {"fork": {"agents": ["square"], "max": 10, "depth": 1}}


def fork_of(*agents, most=10, depth=1, **more):
    return Permissions(fork=ForkPermission(tuple(agents), most, depth), **more)


async def publish(cluster, name, permissions=None, granted=None, **fields):
    """Publish an agent, and grant it what it asks for."""
    await cluster.publish(agent(name, permissions=permissions or {}, **fields))
    if granted is not None:
        await cluster.grant(name, *(Grant(one, one) for one in granted))


def document(name="plan@1.0.0", output="${tasks.begin.forked}", **limits):
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "forks",
        "limits": {"deadline": "60s", **limits},
        "tasks": [{"id": "begin", "agent": name, "input": "${input}"}],
        "output": output,
    }


async def executor(cluster, **agents):
    """Run agents: what one returns is its output, or that and its children, each an agent's name and an input."""
    found = await cluster.executor("one", {}, start=False)

    def reporting(run):
        def reported(assignment, given):
            given = run(assignment, given)
            output, children = given if isinstance(given, tuple) else (given, [])
            staged = tuple(Child(name, msgspec.Raw(msgspec.json.encode(one))) for name, one in children)
            return msgspec.structs.replace(succeeded(assignment, found.session, output), forks=staged)

        return reported

    found.agents = {name: reporting(run) for name, run in agents.items()}
    return cluster.run(found)


def forking(name, inputs):
    """An agent that forks a task of another for each input, whatever it was granted."""
    return lambda assignment, given: ({"forked": len(inputs)}, [(name, one) for one in inputs])


def square(assignment, given):
    return {"square": given["n"] ** 2}


async def outcome(control, job):
    done = await control.finish(job)
    return done.state, done.error_code, done.error_message


async def tasks_of(control, job):
    return list((await control.rpc("Tasks", jobs_pb2.TasksRequest(job_id=job, limit=1000))).tasks)


async def test_a_job_reads_what_its_task_forked(cluster, control):
    await publish(cluster, "plan", FORKS_SQUARE, [fork_of("square")])
    await executor(cluster, plan=forking("square@1.0.0", [{"n": n} for n in (3, 1, 2)]), square=square)
    job = await control.submit(document(), input_json=b"{}")
    done = await control.finish(job)
    assert done.state == "succeeded", done.error_message
    forked = [{"agent": "square@1.0.0", "output": {"square": n * n}} for n in (3, 1, 2)]
    assert msgspec.json.decode(done.output_json) == forked
    parent, *children = await tasks_of(control, job)
    assert [(one.step, one.index, one.parent) for one in children] == [
        ("begin", n, parent.task_id) for n in range(3)
    ]
    assert (parent.index, parent.parent) == (-1, "")
    assert done.tasks.total == 4


# --- what is decided at submit ---


async def test_what_may_be_forked_is_resolved_at_submit_each_in_one_version(cluster, control):
    await publish(cluster, "plan", {"fork": {"agents": ["square", "plan"], "max": 9, "depth": 3}})
    await cluster.grant(
        "plan", Grant(fork_of("square", "plan", most=9, depth=3), fork_of("square", "plan", depth=3))
    )
    newer = msgspec.structs.replace(agent("plan"), version="2.0.0")
    older, yanked = (msgspec.structs.replace(agent("square"), version=version) for version in ("0.9.0", "1.10.0"))
    await cluster.publish(newer, older, yanked)
    await cluster.yank("square", "1.10.0", "wrong")
    # For an agent that it does not know the scheduler reads the log to its end: it knows of the yank then.
    with pytest.raises(InvalidArgument):
        await control.submit(document("nobody@1.0.0"), input_json=b"{}")
    job = await control.submit(document(), input_json=b"{}")
    submitted = msgspec.json.decode((await cluster.log(job))[0].payload)
    # The newest that is not yanked; of an agent that the job file names, the version that it names.
    assert submitted["agents"].keys() == {"plan@1.0.0", "square@1.0.0"}
    assert submitted["agents"]["plan@1.0.0"]["fork"]["agents"] == ["square@1.0.0", "plan@1.0.0"]


@pytest.mark.parametrize(
    ("error_type", "named", "remedy", "agents"),
    [
        (
            InvalidArgument,
            ["tasks[0].agent: plan@1.0.0 may fork sqare", "there is no such agent; did you mean square?"],
            None,
            {"plan": {"fork": {"agents": ["sqare"], "max": 1}}},
        ),
        (
            InvalidArgument,
            ["tasks[0].agent → mid@1.0.0: mid@1.0.0 may fork nobody"],
            None,
            {
                "plan": {"fork": {"agents": ["mid"], "max": 1, "depth": 2}},
                "mid": {"fork": {"agents": ["nobody"], "max": 1}},
            },
        ),
        (
            PermissionDenied,
            ["the permission `fork`, which plan@1.0.0 asks for, is not granted"],
            "hive agent grant plan fork",
            {"plan": ({"fork": {"agents": ["square"], "max": 1}}, [])},
        ),
        (
            PermissionDenied,
            ["the permission `model`, which ask@1.0.0 asks for, is not granted"],
            "hive agent grant ask model",
            {
                "plan": {"fork": {"agents": ["ask"], "max": 1}, "model": {"names": ["m"], "max_tokens": 9}},
                "ask": ({"model": {"names": ["m"], "max_tokens": 9}}, []),
            },
        ),
        (
            PermissionDenied,
            [
                "tasks[0].agent: plan@1.0.0 may fork ask@1.0.0, which asks for more of `model` than",
                "permissions.model",
            ],
            "hive agent grant plan model",
            {
                "plan": {"fork": {"agents": ["ask"], "max": 1}, "model": {"names": ["m"], "max_tokens": 9}},
                "ask": {"model": {"names": ["m"], "max_tokens": 10}},
            },
        ),
        (
            PermissionDenied,
            ["tasks[0].agent → mid@1.0.0: mid@1.0.0 may fork ask@1.0.0, which asks for more of `http` than"],
            "hive agent grant mid http",
            {
                "plan": {"fork": {"agents": ["mid", "ask"], "max": 1, "depth": 2}, "http": {"hosts": ["a.test"]}},
                "mid": {"fork": {"agents": ["ask"], "max": 1}},
                "ask": {"http": {"hosts": ["a.test"]}},
            },
        ),
        (
            PermissionDenied,
            ["plan@1.0.0 may fork mid@1.0.0, which asks for more of `fork` than plan@1.0.0 has itself"],
            "hive agent grant plan fork",
            {
                "plan": {"fork": {"agents": ["mid"], "max": 1, "depth": 2}},
                "mid": {"fork": {"agents": ["square"], "max": 1}},
            },
        ),
    ],
)
async def test_a_job_whose_agents_may_fork_what_does_not_fit_is_refused(
    cluster, control, error_type, named, remedy, agents
):
    for name, asked in agents.items():
        asked, granted = asked if isinstance(asked, tuple) else (asked, [*parts(asked)])
        await publish(cluster, name, asked, granted)
    head = await cluster.reader.head()
    with pytest.raises(error_type) as refused:
        await control.submit(document(), input_json=b"{}")
    assert all(words in refused.value.message for words in named), refused.value.message
    if remedy is not None:
        assert refused.value.fields["remedy"] == remedy and remedy in refused.value.message
    assert await cluster.reader.head() == head


def parts(asked):
    """Yield what a manifest asks for, each permission alone."""
    for name, value in asked.items():
        yield parse({name: value}, "manifest.yaml")


async def test_an_agent_may_fork_itself_as_deep_as_it_was_granted(cluster, control):
    await publish(
        cluster, "plan", {"fork": {"agents": ["plan"], "max": 9, "depth": 2}}, [fork_of("plan", most=9, depth=2)]
    )

    def halve(assignment, given):
        depth = given.get("depth", 0)
        return {"depth": depth}, [("plan@1.0.0", {"depth": depth + 1, "most": given["most"]})] * (
            depth < given["most"]
        )

    await executor(cluster, plan=halve)
    done = await control.finish(await control.submit(document(), input_json=b'{"most": 2}'))
    assert done.state == "succeeded", done.error_message
    forked = [{"agent": "plan@1.0.0", "output": {"depth": depth}} for depth in (1, 2)]
    assert msgspec.json.decode(done.output_json) == forked
    state, code, message = await outcome(control, await control.submit(document(), input_json=b'{"most": 3}'))
    assert (state, code) == ("failed", "permission_denied")
    assert "`fork` is not granted" in message


# --- what is decided at the report ---


async def granted_ten(cluster, **fork):
    """Publish `plan`, which may fork up to 10 tasks of `square`, or what is said."""
    asked = {"agents": ["square"], "max": 10, "depth": 1, **fork}
    await publish(cluster, "plan", {"fork": asked}, [parse({"fork": asked}, "manifest.yaml")])


@pytest.mark.parametrize(
    ("child", "count", "limits", "named"),
    [
        ("square@1.0.0", 11, {}, "is granted for 10 children"),
        ("total@1.0.0", 1, {}, "is granted for square@1.0.0, not for 'total@1.0.0'"),
        ("square", 1, {}, "is granted for square@1.0.0, not for 'square'"),
        ("square@2.0.0", 1, {}, "not for 'square@2.0.0'"),
        ("square@1.0.0", 9, {"fan_out": 9}, "it would have 10 tasks or more, and limits.fan_out allows 9"),
    ],
)
async def test_a_device_that_lies_gets_no_child_made(cluster, control, child, count, limits, named):
    await granted_ten(cluster)
    await executor(cluster, plan=forking(child, [{"n": 1}] * count), square=square)
    job = document(**limits)
    job["tasks"][0]["retry"] = {"max_attempts": 3, "backoff": "1ms"}
    state, code, message = await outcome(control, job := await control.submit(job, input_json=b"{}"))
    assert (state, code) == ("failed", "permission_denied")
    assert "`fork`" in message and named in message
    # Another attempt would fare no better.
    assert [one.attempts for one in await tasks_of(control, job)] == [1]


async def test_what_was_not_granted_at_all_is_forked_by_nobody(cluster, control):
    await publish(cluster, "plan")
    await executor(cluster, plan=forking("square@1.0.0", [{"n": 1}]), square=square)
    state, code, message = await outcome(control, await control.submit(document(), input_json=b"{}"))
    assert (state, code) == ("failed", "permission_denied")
    assert "`fork` is not granted" in message


async def test_a_grant_that_is_taken_back_meanwhile_counts_at_the_report(cluster, control):
    await granted_ten(cluster)

    async def known(control):
        while True:
            try:
                extra = await control.submit(document(), input_json=b"{}")
            except PermissionDenied:
                return
            await control.rpc("Cancel", jobs_pb2.CancelRequest(job_id=extra, caller="me"))

    fake = await cluster.executor("one", {}, start=False)
    job = await control.submit(document(), input_json=b"{}")
    (assignment,) = (await fake.pull(fake.pull_request(slots_free=1), 30)).assignments
    await cluster.revoke("plan", "fork")
    await known(control)
    report = succeeded(assignment, fake.session, {})
    await fake.report(msgspec.structs.replace(report, forks=(Child("square@1.0.0", msgspec.Raw(b'{"n":1}')),)))
    state, code, message = await outcome(control, job)
    assert (state, code) == ("failed", "permission_denied")
    assert "hive agent grant plan fork" in message


async def test_tasks_share_what_an_ancestor_was_granted_also_in_one_batch_of_reports(cluster, control):
    """`plan` may have 5 tasks below it: 2 of `mid`, which both want 2 more, and say so in the same message."""
    ask = {"agents": ["mid", "square"], "max": 5, "depth": 2}
    await publish(cluster, "plan", {"fork": ask}, [parse({"fork": ask}, "manifest.yaml")])
    await publish(cluster, "mid", FORKS_SQUARE, [fork_of("square")])
    fake = await cluster.executor("one", {}, start=False)
    job = await control.submit(document(), input_json=b"{}")
    (plan,) = (await fake.pull(fake.pull_request(slots_free=1), 30)).assignments

    def forking_two(assignment, name):
        report = succeeded(assignment, fake.session, {})
        return msgspec.structs.replace(report, forks=(Child(name, msgspec.Raw(b'{"n":1}')),) * 2)

    await fake.report(forking_two(plan, "mid@1.0.0"))
    mids = []
    while len(mids) < 2:
        mids += (await fake.pull(fake.pull_request(slots_free=2 - len(mids)), 30)).assignments
    tokens = [claims(one, fake.id) for one in mids]
    assert [(one.permissions.fork.max, one.permissions.fork.depth) for one in tokens] == [(5, 1)] * 2
    await fake.report(*(forking_two(one, "square@1.0.0") for one in mids))
    state, code, message = await outcome(control, job)
    assert (state, code) == ("failed", "permission_denied")
    assert "is granted to plan@1.0.0 for 5 tasks below it, not for 6" in message
    states = sorted(one.state for one in await tasks_of(control, job) if one.parent == plan.task)
    assert states == ["failed", "succeeded"]


def claims(assignment, executor_id):
    verifier = Verifier(public_key(TOKEN_KEY))
    return verifier.verify(assignment.token, executor=executor_id, now_us=time.time_ns() // 1_000)


async def test_inputs_that_do_not_fit_fail_the_attempt_which_may_be_tried_again(cluster, control):
    await granted_ten(cluster)
    schema = {"type": "object", "required": ["m"]}
    await cluster.publish(msgspec.structs.replace(agent("square", input=schema), version="2.0.0"))
    tries = []

    def plan(assignment, given):
        tries.append(assignment)
        good = [("square@2.0.0", {"m": 1, "n": 2})] * 2
        return {}, [*good, ("square@2.0.0", {"n": 1})] if len(tries) == 1 else good

    await executor(cluster, plan=plan, square=square)
    job = document()
    job["tasks"][0]["retry"] = {"max_attempts": 2, "backoff": "1ms"}
    done = await control.finish(job_id := await control.submit(job, input_json=b"{}"))
    assert (done.state, len(tries)) == ("succeeded", 2), done.error_message
    failures = [one for one in await control.watch(job_id) if one.type == "AttemptFailed"]
    data = [msgspec.json.decode(one.data_json) for one in failures]
    assert [one["code"] for one in data] == ["invalid_output"]
    assert "fork 2: does not fit the input schema of square@2.0.0" in data[0]["message"]


async def test_more_input_than_a_report_carries_is_refused(cluster, control):
    await granted_ten(cluster)
    half = {"n": "x" * (FORK_STAGED_BYTES_MAX // 2)}
    await executor(cluster, plan=forking("square@1.0.0", [half, half]))
    state, code, message = await outcome(control, await control.submit(document(), input_json=b"{}"))
    assert (state, code) == ("failed", "output_exceeded")
    assert str(FORK_STAGED_BYTES_MAX) in message


# --- what becomes of them ---


async def test_a_child_gets_a_token_with_no_more_than_its_parent_has(cluster, control):
    http = HttpPermission(("a.test", "b.test"))
    model = ModelPermission(("m",), 10)
    asked = {"fork": {"agents": ["ask"], "max": 3}, "http": {"hosts": ["a.test", "b.test"]}}
    await publish(cluster, "plan", {**asked, "model": {"names": ["m"], "max_tokens": 10}})
    own = Permissions(model=model), fork_of("ask", most=3)
    await cluster.grant(
        "plan", *(Grant(one, one) for one in own), Grant(Permissions(http=http), Permissions(http=http), ask=True)
    )
    less = {"model": {"names": ["m"], "max_tokens": 4}, "http": {"hosts": ["b.test"]}}
    await publish(cluster, "ask", less, [*parts(less)])
    seen = {}

    def ask(assignment, given):
        seen["ask"] = assignment
        return {}

    def plan(assignment, given):
        seen["plan"] = assignment
        return {}, [("ask@1.0.0", {})]

    fake = await executor(cluster, plan=plan, ask=ask)
    job = await control.submit(document(), input_json=b"{}")
    assert (await control.finish(job)).state == "succeeded"
    parent, child = claims(seen["plan"], fake.id), claims(seen["ask"], fake.id)
    # Where a person is asked about the parent, one is asked about the child.
    assert parent.permissions.asks == ("http",)
    narrow = HttpPermission(("b.test",))
    assert child.permissions == Permissions(model=ModelPermission(("m",), 4), http=narrow, asks=("http",))
    assert (child.job, child.task) == (job, seen["ask"].task)


async def test_what_comes_after_waits_for_all_descendants_and_reads_them_in_order(cluster, control):
    ask = {"agents": ["mid", "square"], "max": 20, "depth": 2}
    await publish(cluster, "plan", {"fork": ask}, [parse({"fork": ask}, "manifest.yaml")])
    await publish(cluster, "mid", FORKS_SQUARE, [fork_of("square")])

    def mid(assignment, given):
        return {"mid": given["n"]}, [("square@1.0.0", {"n": given["n"] + more}) for more in (1, 2)]

    def plan(assignment, given):
        return {"plan": given["n"]}, [("mid@1.0.0", {"n": given["n"] + 10}), ("square@1.0.0", {"n": given["n"]})]

    await executor(cluster, plan=plan, mid=mid, square=square, total=lambda assignment, given: given)
    job = document(output="${tasks.end.output}")
    job["tasks"][0] |= {"fork": "${input.numbers}", "input": {"n": "${item}"}}
    reads = {
        "all": "${tasks.begin.forked}",
        "squares": "${tasks.begin.forked[?agent=='square@1.0.0'].output.square}",
    }
    job["tasks"].append({"id": "end", "agent": "total@1.0.0", "needs": ["begin"], "input": reads})
    done = await control.finish(await control.submit(job, input_json=b'{"numbers": [1, 5]}'))
    assert done.state == "succeeded", done.error_message
    found = msgspec.json.decode(done.output_json)
    # In the order of the list; each child is followed by what it forked itself.
    assert [one["output"] for one in found["all"]] == [
        one
        for n in (1, 5)
        for one in ({"mid": n + 10}, {"square": (n + 11) ** 2}, {"square": (n + 12) ** 2}, {"square": n * n})
    ]
    assert found["squares"] == [144, 169, 1, 256, 289, 25]
    assert [(step.step, step.tasks.succeeded) for step in done.steps] == [("begin", 10), ("end", 1)]


async def test_a_step_that_forked_nothing_reads_an_empty_list(cluster, control):
    await executor(cluster, square=square)
    job = document("square@1.0.0", output={"forked": "${tasks.begin.forked}", "all": "${tasks.begin}"})
    done = await control.finish(await control.submit(job, input_json=b'{"n": 3}'))
    assert msgspec.json.decode(done.output_json) == {
        "forked": [],
        "all": {"output": {"square": 9}, "forked": []},
    }


async def test_a_child_is_retried_as_its_step_says_and_its_failure_ends_the_job(cluster, control, fail):
    await granted_ten(cluster)
    tries = []

    def fails(assignment, given):
        tries.append(given["n"])
        if given["n"] == 1 or (given["n"] == 2 and tries.count(2) == 1):
            raise fail("agent_error")
        return {}

    await executor(cluster, plan=forking("square@1.0.0", [{"n": 2}, {"n": 1}]), square=fails)
    job = document()
    job["tasks"][0]["retry"] = {"max_attempts": 2, "backoff": "1ms"}
    job = await control.submit(job, input_json=b"{}")
    assert (await outcome(control, job))[:2] == ("failed", "agent_error")
    assert tries.count(1) == 2
    (done,) = [one for one in await tasks_of(control, job) if one.state == "failed"]
    assert (done.index, (await control.get(job)).error_task) == (1, done.task_id)


async def test_a_cancel_takes_children_with_it(cluster, control):
    await granted_ten(cluster)
    fake = await cluster.executor("one", {}, start=False)
    job = await control.submit(document(), input_json=b"{}")
    (plan,) = (await fake.pull(fake.pull_request(slots_free=1), 30)).assignments
    report = succeeded(plan, fake.session, {})
    await fake.report(msgspec.structs.replace(report, forks=(Child("square@1.0.0", msgspec.Raw(b'{"n":1}')),) * 3))
    await control.rpc("Cancel", jobs_pb2.CancelRequest(job_id=job, caller="me"))
    assert (await outcome(control, job))[0] == "cancelled"
    assert [one.state for one in await tasks_of(control, job)] == ["succeeded", *["cancelled"] * 3]


async def test_children_are_made_once_whatever_a_crash_comes_between(cluster, monkeypatch):
    """The leader dies while children are made; the next one goes on where the log stands, as its replay does."""
    monkeypatch.setattr(engine, "CHUNK_EVENTS_MAX", 7)
    await cluster.publish(agent("square"))
    await granted_ten(cluster, max=100)
    first = cluster.control(lease_ms=60_000)
    await first.start()
    fake = await cluster.executor("one", {}, start=False)
    job = await first.submit(document(), input_json=b"{}")
    (plan,) = (await fake.pull(fake.pull_request(slots_free=1), 30)).assignments
    children = tuple(Child("square@1.0.0", msgspec.Raw(b'{"n":%d}' % n)) for n in range(40))
    # Whoever stops a scheduler now stops it between two chunks: the third is never decided.
    chunks = []
    resume = engine.Engine._resume

    def resumes_twice(self, job_id):
        chunks.append(job_id)
        if len(chunks) <= 2:
            resume(self, job_id)

    monkeypatch.setattr(engine.Engine, "_resume", resumes_twice)
    await fake.report(msgspec.structs.replace(succeeded(plan, fake.session, {}), forks=children))
    await first.shut_down()
    monkeypatch.setattr(engine.Engine, "_resume", resume)
    made = [one for one in await cluster.log() if one.type == "TaskCreated"]
    assert 1 < len(made) < 41
    now_us = SystemClock().now_us()
    replayed, _ = await replay(cluster.reader, Specs(), now_us)
    async with await psycopg.AsyncConnection.connect(
        cluster.database.role_dsn("scheduler"), autocommit=True
    ) as conn:
        recovered, _ = await recover(PostgresOpenJobs(conn), cluster.reader, Specs(), now_us)
    assert snapshot(recovered.jobs[job]) == snapshot(replayed.jobs[job])
    second = cluster.control()
    await second.start()
    await executor(cluster, square=square)
    done = await second.finish(job)
    assert done.state == "succeeded", done.error_message
    assert [one["output"]["square"] for one in msgspec.json.decode(done.output_json)] == [n * n for n in range(40)]
    created = [one.stream for one in await cluster.log() if one.type == "TaskCreated"]
    assert len(created) == len(set(created)) == 41


async def test_inputs_of_many_children_do_not_pile_up_in_memory(cluster, control, monkeypatch):
    monkeypatch.setattr(jobs, "INLINE_BYTES_MAX", 8 << 10)
    await granted_ten(cluster)
    fake = await cluster.executor("one", {"square": lambda assignment, given: {"n": 1}}, start=False)
    job = await control.submit(document(), input_json=b"{}")
    (plan,) = (await fake.pull(fake.pull_request(slots_free=1), 30)).assignments
    texts = [msgspec.json.encode({"n": 1, "text": str(number) * 3_000}) for number in range(8)]
    forks = tuple(Child("square@1.0.0", msgspec.Raw(text)) for text in texts)
    await fake.report(msgspec.structs.replace(succeeded(plan, fake.session, {}), forks=forks))
    # While none of them runs, none gives back its room.
    while len(await tasks_of(control, job)) <= len(forks):
        await asyncio.sleep(0.01)
    cluster.run(fake)
    done = await control.finish(job)
    assert done.state == "succeeded", done.error_message
    created = [msgspec.json.decode(one.data_json) for one in await control.watch(job) if one.type == "TaskCreated"]
    kept = ["inline" in one["input"] for one in created if "parent" in one]
    assert kept == [True, True, *[False] * 6], "there was room for two"


async def test_an_agent_that_is_stopped_is_forked_by_nobody(cluster, control):
    await granted_ten(cluster)
    runs, never = asyncio.Event(), asyncio.Event()

    async def waits(assignment, given):
        runs.set()
        await never.wait()

    fake = await cluster.executor("one", {"square": waits}, start=False)
    job = await control.submit(document(), input_json=b"{}")
    (plan,) = (await fake.pull(fake.pull_request(slots_free=1), 30)).assignments
    report = succeeded(plan, fake.session, {})
    await fake.report(msgspec.structs.replace(report, forks=(Child("square@1.0.0", msgspec.Raw(b'{"n":1}')),) * 2))
    cluster.run(fake)
    await runs.wait()
    await cluster.order(cluster.kill_key.kill("agent", "square", "hostile"))
    state, code, message = await outcome(control, job)
    assert (state, code) == ("failed", "killed")
    assert "agent square is stopped by kill order 1 (hostile)" in message
    with pytest.raises(FailedPrecondition, match="hive unkill --agent square"):
        await control.submit(document(), input_json=b"{}")
