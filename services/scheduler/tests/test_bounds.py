"""What one job may hold in the leader's memory."""

import msgspec
from hive_common.artifacts.store import FolderStore
from hive_common.contracts import events
from hive_scheduler.domain import job as jobs
from hive_scheduler.recovery import Fold
from hive_scheduler.submission import Specs

INLINE_BYTES_MAX = 20_000


async def test_a_fork_of_large_values_keeps_most_of_them_in_the_store(cluster, control, one_step, monkeypatch):
    monkeypatch.setattr(jobs, "INLINE_BYTES_MAX", INLINE_BYTES_MAX)
    store = FolderStore(cluster.folder / "artifacts")
    texts = [f"{number:03}".ljust(3_000, "x") for number in range(40)]

    async def total(assignment, given):
        value = assignment.input
        return msgspec.json.decode(await store.get(value.digest))["n"] if given is None else given["n"]

    fake = await cluster.executor("one", {"total": total}, slots=2)
    task = one_step["tasks"][0]
    job_id = await control.submit(
        {
            **one_step,
            "input": {"texts": texts},
            "tasks": [
                {**task, "id": "begin", "agent": "total@1.0.0", "input": {"n": "${input.texts}"}},
                {
                    **task,
                    "id": "each",
                    "agent": "total@1.0.0",
                    "needs": ["begin"],
                    "fork": "${tasks.begin.output}",
                    "input": {"n": "${item}"},
                },
            ],
            "output": "${tasks.each.output}",
        }
    )
    job = await control.finish(job_id)
    assert job.state == "succeeded", job
    assert msgspec.json.decode(job.output_json) == texts
    await fake.stop()

    fold, held, by_digest = Fold(Specs()), 0, {"TaskCreated": 0, "AttemptSucceeded": 0}
    for stored in await cluster.reader.read(0, 10_000):
        fold.apply([stored])
        open_job = fold.jobs.get(job_id)
        held = max(held, 0 if open_job is None else open_job.inline_bytes)
        event = events.decode(stored.type, stored.schema, stored.payload)
        if isinstance(event, events.TaskCreated | events.AttemptSucceeded):
            value = event.input if isinstance(event, events.TaskCreated) else event.output
            by_digest[stored.type] += value is not None and value.digest is not None
    assert by_digest["TaskCreated"] > 20 and by_digest["AttemptSucceeded"] > 20
    # Reports of one batch are looked at together.
    assert INLINE_BYTES_MAX / 2 < held < INLINE_BYTES_MAX + 4 * 3_100
