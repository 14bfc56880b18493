"""Publishes pulls and reports of one executor as fast as one process can: `flooder.py URL CREDENTIALS ID`."""

import asyncio
import os
import sys

import msgspec
from hive_common.bus.nats import connect
from hive_common.contracts import messages
from hive_common.contracts.messages import PullRequest, ReportRequest
from hive_common.ops.config import NatsConfig

BATCH = 500
LESS, LEAST = 10, 19
"""So many steps behind the others, and the last there is."""


async def main(url: str, credentials: str, executor: str) -> None:
    """Flood until killed, but on time that nobody else needs here: a flooder elsewhere takes none."""
    if os.nice(0) + LESS <= LEAST:
        os.nice(LESS)
    else:
        # Tests that run behind everything else leave no room below them but this.
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    client = await connect(NatsConfig(url, credentials), executor, inbox=messages.inbox_prefix(executor))
    inbox = f"{messages.inbox_prefix(executor)}.x"
    pull = msgspec.json.encode(PullRequest(session="s", sequence=1, slots_free=0))
    report = msgspec.json.encode(ReportRequest(session="s", reports=()))
    print("flooding", flush=True)
    while True:
        for _ in range(BATCH):
            await client.publish(messages.pull_subject(executor), pull, reply=inbox)
            await client.publish(messages.report_subject(executor), report, reply=inbox)
        await client.flush()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
