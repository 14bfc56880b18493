"""Tasks that tasks fork: resolved at submit, checked at the report, made once, with less than their parents have."""

import time

import msgspec
import pytest
from hive_common.contracts.events import Child
from hive_common.contracts.limits import FORK_STAGED_BYTES_MAX
from hive_common.contracts.permissions import ForkPermission, HttpPermission, ModelPermission, Permissions
from hive_common.kernel.errors import InvalidArgument, PermissionDenied
from hive_common.permissions.grants import Grant
from hive_common.permissions.tokens import Verifier, public_key
from hive_proto.jobs.v1 import jobs_pb2

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
    assert [(one.step, one.index, one.parent) for one in children] == [("begin", n, parent.task_id) for n in range(3)]
    assert (parent.index, parent.parent) == (-1, "")
    assert done.tasks.total == 4
