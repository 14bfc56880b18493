"""What one job may hold in the leader's memory, and what a new leader reads of a long log."""

import msgspec
import psycopg
import pytest
from hive_common.artifacts.store import FolderStore
from hive_common.contracts import events
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.kernel.ids import new_id
from hive_scheduler import queries, recovery
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

    fake = await cluster.executor("one", {"total": total}, slots=2, start=False)
    report, batches = fake.report, []

    async def counted(*reports):
        batches.append(len(reports))
        return await report(*reports)

    monkeypatch.setattr(fake, "report", counted)
    cluster.run(fake)
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

    fold, held, by_digest = Fold(Specs(), 0), 0, {"TaskCreated": 0, "AttemptSucceeded": 0}
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
    assert INLINE_BYTES_MAX / 2 < held < INLINE_BYTES_MAX + max(batches) * 3_100


def rows_of(plan):
    yield plan["Actual Rows"] * plan["Actual Loops"] + plan.get("Rows Removed by Filter", 0)
    for below in plan.get("Plans", ()):
        yield from rows_of(below)


@pytest.mark.parametrize("query", [recovery._EVENTS, queries._PAYLOADS], ids=["recovery", "outputs"])
async def test_events_at_given_positions_are_read_without_all_the_others(cluster, query):
    async with await LogWriter.open(cluster.database.role_dsn("scheduler")) as writer:
        for _ in range(10):
            noted = (NewEvent(new_id(), 1, "TaskNoted", 1, b"{}", 1, "scheduler", "owner") for _ in range(500))
            await writer.append(Append(tuple(noted)))
    wanted = list(range(3_001, 4_001))
    async with await psycopg.AsyncConnection.connect(cluster.database.dsn, autocommit=True) as conn:
        await conn.execute("ANALYZE log.events, log.payloads")
        # As a server has it that is not ours, and where plans that read too much are likelier.
        await conn.execute("SET random_page_cost = 4")
        parameters = {"positions": wanted, "first": wanted[0], "last": wanted[-1]}
        found = await (await conn.execute("EXPLAIN (ANALYZE, FORMAT JSON) " + query, parameters)).fetchone()
    assert max(rows_of(found[0][0]["Plan"])) <= len(wanted), found
