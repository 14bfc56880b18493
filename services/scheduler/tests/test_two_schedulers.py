"""Two schedulers that fight for the lead while the wire to Postgres is cut under both of them."""

import asyncio
import contextlib
import os
import random

import msgspec
import pytest
from hive_common.artifacts.manifest import AgentManifest
from hive_common.kernel.errors import HiveError
from hive_common.testing.proxy import POSTGRES_READY, TcpProxy
from hive_proto.jobs.v1 import jobs_pb2
from psycopg.conninfo import make_conninfo

from .test_faults import assert_the_laws_hold, fork_of

SEED = int(os.environ.get("HIVE_CHAOS_SEED", "20261125"))
ROUNDS = int(os.environ.get("HIVE_CHAOS_ROUNDS", "1"))
JOBS, FORKS = 8, 25
CUTS = ["all"] * 3 + ["answer"] * 3 + ["request"] * 2
SQUARE = AgentManifest(name="square", version="1.0.0", runtime="python", entry="agent.py")


async def cut_again_and_again(proxy, rng, controls):
    """Cut answers at commit, requests, and everything at once, each when one of them leads."""
    for how in rng.sample(CUTS, len(CUTS)):
        await from_either(controls, lambda control: control.rpc("List", jobs_pb2.ListRequest(limit=1)))
        if how == "all":
            proxy.cut_all()
        else:
            cut = proxy.cut_next_answer(POSTGRES_READY) if how == "answer" else proxy.cut_next_request()
            async with asyncio.timeout(60):
                await cut.wait()
        await asyncio.sleep(rng.uniform(0, 0.5))


async def from_either(controls, ask):
    """Ask one scheduler after the other until one answers."""
    while True:
        for control in controls:
            with contextlib.suppress(HiveError):
                return await ask(control)
        await asyncio.sleep(0.05)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("seed", range(SEED, SEED + ROUNDS))
async def test_two_schedulers_whose_connections_are_cut_do_everything_once(cluster, one_step, seed):
    rng = random.Random(seed)
    await cluster.publish(SQUARE)

    async def slow(assignment, given):
        await asyncio.sleep(rng.uniform(0, 0.05))
        return given["n"] ** 2

    executors = [await cluster.executor(name, {"square": slow}, slots=4) for name in ("one", "two")]
    async with TcpProxy(cluster.database.server.port) as proxy:
        dsn = make_conninfo(cluster.database.role_dsn("scheduler"), port=proxy.port)
        controls = [cluster.control_process(dsn) for _ in range(2)]
        supervisors = [asyncio.create_task(control.supervise()) for control in controls]
        cutting = asyncio.create_task(cut_again_and_again(proxy, rng, controls))

        async def one(number):
            await asyncio.sleep(number / 2)
            document = fork_of(FORKS, one_step)
            job_id = await from_either(controls, lambda c: c.submit(document, idempotency_key=str(number)))
            while True:
                job = await from_either(controls, lambda c: c.get(job_id))
                if job.state != "running":
                    return job
                await asyncio.sleep(0.1)

        jobs = await asyncio.gather(*(one(number) for number in range(JOBS)))
        await cutting
        for supervisor in supervisors:
            supervisor.cancel()
        await asyncio.gather(*supervisors, return_exceptions=True)
        for control in controls:
            await control.shut_down()
    restarts = sum(control.restarts for control in controls)
    assert restarts >= CUTS.count("all")  # whoever led then has ended, and was started again
    for job in jobs:
        assert (job.state, msgspec.json.decode(job.output_json)) == ("succeeded", [n * n for n in range(FORKS)])
    counts = await assert_the_laws_hold(cluster)
    assert (counts["JobSubmitted"], counts["JobSucceeded"]) == (JOBS, JOBS)
    assert counts["TaskCreated"] == counts["TaskSucceeded"] == counts["AttemptSucceeded"] == JOBS * FORKS
    # The leads changed, each with a higher epoch; what one has assigned, the next one does not assign again.
    epochs = [reply.epoch for reply in executors[0].replies if reply.epoch]
    assert epochs and epochs == sorted(epochs)
    ran = [key for executor in executors for key in executor.ran]
    assert len(ran) == len(set(ran))
    print(f"{seed=} {restarts=} epochs={len(set(epochs))} appended={counts.total()}")
