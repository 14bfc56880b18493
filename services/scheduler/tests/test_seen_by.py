"""Keys of users see the jobs that they submitted: whatever the method, another's job is one that does not exist."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Final

import msgspec
import pytest
from hive_common.kernel.errors import FailedPrecondition, HiveError, NotFound
from hive_common.rpc.client import bearer, call, stream
from hive_common.rpc.rules import KeyRules, metadata_of
from hive_proto.jobs.v1 import jobs_pb2

from .conftest import KEY

ADA, BOB = "pseudonym-of-ada", "pseudonym-of-bob"
NOBODYS: Final = "01890000-0000-7000-8000-0000000000ff"

ABOUT_A_JOB: dict[str, Callable[[str, str], Any]] = {
    "Get": lambda job, task: jobs_pb2.GetRequest(job_id=job),
    "Cancel": lambda job, task: jobs_pb2.CancelRequest(job_id=job),
    "Watch": lambda job, task: jobs_pb2.WatchRequest(job_id=job, history_only=True),
    "WatchBatches": lambda job, task: jobs_pb2.WatchRequest(job_id=job, history_only=True),
    "Explain": lambda job, task: jobs_pb2.ExplainRequest(task_id=task),
    "GetDecision": lambda job, task: jobs_pb2.GetDecisionRequest(task_id=task),
    "Tasks": lambda job, task: jobs_pb2.TasksRequest(job_id=job),
    "Logs": lambda job, task: jobs_pb2.LogsRequest(job_id=job),
    "Logs of a task": lambda job, task: jobs_pb2.LogsRequest(job_id=job, task_id=task),
    "Logs of a task alone": lambda job, task: jobs_pb2.LogsRequest(task_id=task),
    "List from a job on": lambda job, task: jobs_pb2.ListRequest(after=job),
}
NOT_ABOUT_ONE = {"Submit", "List"}


async def ask(control: Any, name: str, request: Any, only: str = "") -> Any:
    metadata = (*bearer(KEY), *metadata_of(KeyRules(key="ci", only=only)))
    given = getattr(control.jobs, name.partition(" ")[0])(request, metadata=metadata, timeout=60)
    return await call(given) if hasattr(given, "__await__") else [message async for message in stream(given)]


async def submitted(control: Any, document: dict[str, Any], caller: str) -> str:
    request = jobs_pb2.SubmitRequest(document_json=msgspec.json.encode(document), caller=caller)
    answer: jobs_pb2.SubmitResponse = await ask(control, "Submit", request, only=caller)
    return answer.job_id


async def first_task(control: Any, job: str) -> str:
    """Return the id of a job's task, once there is one."""
    async for event in control.jobs.Watch(jobs_pb2.WatchRequest(job_id=job), metadata=bearer(KEY), timeout=60):
        if event.type == "TaskCreated":
            return str(event.stream)
    raise AssertionError("the job ended without a task")


async def refusal(control: Any, name: str, job: str, task: str) -> dict[str, Any]:
    """Return how Bob is refused, without the ids that he gave."""
    with pytest.raises(NotFound) as refused:
        await ask(control, name, ABOUT_A_JOB[name](job, task), only=BOB)
    error: HiveError = refused.value
    return {"message": error.message.replace(job, "…").replace(task, "…"), "fields": sorted(error.fields)}


def test_every_method_is_in_the_table() -> None:
    methods = {method.name for method in jobs_pb2.DESCRIPTOR.services_by_name["Jobs"].methods}
    assert methods == {name.partition(" ")[0] for name in ABOUT_A_JOB} | NOT_ABOUT_ONE


@pytest.mark.parametrize("ended", [False, True], ids=["while it runs", "read from the views"])
async def test_another_keys_job_is_one_that_does_not_exist(cluster, control, one_step, ended) -> None:
    if ended:
        await cluster.executor("one", {"square": lambda assignment, given: {"n": 9}})
    job = await submitted(control, one_step, ADA)
    task = await first_task(control, job)
    if ended:
        await control.finish(job)
        await control.shut_down()
        control = cluster.control()  # which knows nothing of it but what the views say
        await control.start()
    for name in ABOUT_A_JOB:
        assert await refusal(control, name, job, task) == await refusal(control, name, NOBODYS, NOBODYS), name
    assert (await ask(control, "Get", jobs_pb2.GetRequest(job_id=job))).state == (
        "succeeded" if ended else "running"
    )
    for only in (ADA, ""):
        for name, request in ABOUT_A_JOB.items():
            # Who may see the task is told that nothing was decided over it, and not that it does not exist.
            undecided = pytest.raises(FailedPrecondition, match="was not judged")
            with undecided if name == "GetDecision" else nullcontext():
                await ask(control, name, request(job, task), only=only)


async def test_lists_have_the_jobs_of_the_key_that_asks_and_all_for_the_owner(control, one_step) -> None:
    adas = [await submitted(control, one_step, ADA) for _ in range(3)]
    bobs, anonymous = await submitted(control, one_step, BOB), await submitted(control, one_step, "")

    async def listed(only: str, **fields: Any) -> list[str]:
        found = await ask(control, "List", jobs_pb2.ListRequest(**fields), only=only)
        return [job.job_id for job in found.jobs]

    assert await listed(ADA) == adas[::-1]
    assert await listed(ADA, limit=1, after=adas[2], state="running") == [adas[1]]
    assert await listed(BOB) == [bobs]
    assert await listed("pseudonym-of-eve") == []
    assert await listed("") == [anonymous, bobs, *adas[::-1]]
