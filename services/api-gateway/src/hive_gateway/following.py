"""Following a job for as long as it runs, also while the scheduler is restarted."""

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Sequence

from hive_common.contracts.events import JOB_TERMINAL
from hive_common.kernel.errors import DeadlineExceeded, Unavailable
from hive_proto.jobs.v1 import jobs_pb2

from hive_gateway.peers import Peers
from hive_gateway.upstream import Upstream

RUNNING_STATES = frozenset({"running", "cancelling"})
REATTACH_S = 60.0
"""How long a scheduler may be away before a follower is told so."""

_DELAY_S = 0.2
_DELAY_MAX_S = 2.0
_SOUND_S = 10.0
"""A call that lasted this long was no failed attempt to attach."""


async def follow_job(
    peers: Peers, upstream: Upstream, job_id: str, position: int
) -> AsyncGenerator[Sequence[jobs_pb2.JobEvent], None]:
    """Yield the events of a job after `position` until it has ended, each once and in order, as they come together.

    A stream that breaks is taken up again behind the last event. Positions rise, so nothing comes twice. Who looks
    at the job after its end has come sees that it has ended: the scheduler waits for its views then.

    Raises:
        Unavailable: the scheduler has been away for `REATTACH_S`, or is before the first event has come.
        NotFound: there is no such job.
    """
    failing_since: float | None = None
    delay_s = _DELAY_S
    seen = 0
    while True:
        attached = time.monotonic()
        try:
            request = jobs_pb2.WatchRequest(job_id=job_id, from_position=position)
            batches = upstream.stream(peers.scheduler, peers.jobs.WatchBatches, request)
            async with contextlib.aclosing(batches):
                async for batch in batches:
                    seen = position = batch.events[-1].position
                    failing_since, delay_s = None, _DELAY_S
                    yield batch.events
                    if batch.events[-1].type in JOB_TERMINAL:
                        return
            if not await _runs(peers, upstream, job_id, seen):
                return
        except (Unavailable, DeadlineExceeded):
            if position == 0:
                raise
            now = time.monotonic()
            if failing_since is None or now - attached > _SOUND_S:
                failing_since = now
            if now - failing_since > REATTACH_S:
                raise
        await asyncio.sleep(delay_s)
        delay_s = min(delay_s * 2, _DELAY_MAX_S)


async def _runs(peers: Peers, upstream: Upstream, job_id: str, seen: int) -> bool:
    """Say whether the job runs as of position `seen`: a scheduler that stops may end its streams without a word."""
    request = jobs_pb2.GetRequest(job_id=job_id, min_position=seen)
    job = await peers.scheduler.ask(peers.jobs.Get, request, upstream.caller)
    return job.state in RUNNING_STATES
