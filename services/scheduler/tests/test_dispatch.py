"""Jobs from submit to result, with a real log and a real bus."""

import msgspec
import psycopg


async def test_a_job_of_one_step_runs_and_its_output_is_the_tasks(cluster, control, one_step):
    await cluster.executor("one", {"square": lambda assignment, given: {"n": given["n"] ** 2}})
    job_id = await control.submit(one_step)
    job = await control.finish(job_id)
    assert job.state == "succeeded"
    assert msgspec.json.decode(job.output_json) == {"n": 9}
    assert (job.tasks.total, job.tasks.succeeded, job.attempts) == (1, 1, 1)
    assert [event.type for event in await control.watch(job_id)] == [
        "JobSubmitted",
        "TaskCreated",
        "TaskAssigned",
        "AttemptSucceeded",
        "TaskSucceeded",
        "JobSucceeded",
    ]


async def test_a_submit_and_the_tasks_that_follow_from_it_are_one_commit(cluster, control, one_step):
    job_id = await control.submit(one_step)
    async with await psycopg.AsyncConnection.connect(cluster.database.dsn) as connection:
        found = await connection.execute("SELECT type, xmin::text FROM log.events ORDER BY position DESC LIMIT 2")
        rows = await found.fetchall()
    assert [row[0] for row in rows] == ["TaskCreated", "JobSubmitted"], "the answer came after both"
    assert len({row[1] for row in rows}) == 1
    assert (await control.get(job_id)).tasks.total == 1
