"""Submits on their way to the scheduler: those that come close together go in one call.

A call costs more than taking a job. One that comes while nothing else does goes at once; under load each call takes
along what has come while the ones before it were under way.
"""

import asyncio
from collections import deque
from typing import Final, NamedTuple

import msgspec
from hive_common.contracts.limits import KIB
from hive_common.kernel.errors import ErrorBody, Internal
from hive_proto.jobs.v1 import jobs_pb2

from hive_gateway.keys import Caller
from hive_gateway.peers import SUBMIT_S, Peers

CALLS_MAX: Final = 2
"""Calls under way: while the jobs of one are committed, those of another are checked."""
SUBMITS_MAX: Final = 128
SMALL_BYTES_MAX: Final = 32 * KIB
"""A larger job goes alone: it takes long to check, and others would wait for it."""

_decode_error = msgspec.json.Decoder(ErrorBody).decode


class _Waiting(NamedTuple):
    request: jobs_pb2.SubmitRequest
    answer: asyncio.Future[jobs_pb2.SubmitResponse]


class Intake:
    """Submits jobs for any number of callers at once."""

    def __init__(self, peers: Peers) -> None:
        self._peers = peers
        self._waiting: deque[_Waiting] = deque()
        self._calls: set[asyncio.Task[None]] = set()

    @property
    def waiting(self) -> int:
        """Submits that have not been sent yet."""
        return sum(not one.answer.done() for one in self._waiting)

    async def submit(self, request: jobs_pb2.SubmitRequest, caller: Caller) -> jobs_pb2.SubmitResponse:
        """Return what the scheduler answers, once the job is committed. Raises the catalogue's error.

        A submit whose caller goes away before it was sent is not sent.
        """
        size = len(request.document_json) + len(request.input_json)
        # What needs another look-up before it is decided goes alone as well.
        if size > SMALL_BYTES_MAX or request.input_digest or request.idempotency_key:
            return await self._peers.scheduler.ask(self._peers.jobs.Submit, request, caller, SUBMIT_S)
        waiting = _Waiting(request, asyncio.get_running_loop().create_future())
        self._waiting.append(waiting)
        if len(self._calls) < CALLS_MAX:
            call = asyncio.create_task(self._send(), name="intake")
            self._calls.add(call)
            call.add_done_callback(self._calls.discard)
        return await waiting.answer

    async def _send(self) -> None:
        """Send what waits until nothing does."""
        while batch := self._take():
            message = jobs_pb2.SubmitManyRequest(submits=[one.request for one in batch])
            try:
                answer = await self._peers.scheduler.ask(self._peers.intake.SubmitMany, message, None, SUBMIT_S)
                if len(answer.results) != len(batch):
                    raise Internal(f"the scheduler answered {len(answer.results)} of {len(batch)} submits")
                for one, result in zip(batch, answer.results, strict=True):
                    _resolve(one.answer, result)
            except Exception as error:  # noqa: BLE001 - the callers raise it, each in its own name
                for one in batch:
                    if not one.answer.done():
                        one.answer.set_exception(error)
            finally:
                for one in batch:
                    one.answer.cancel()

    def _take(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        while self._waiting and len(batch) < SUBMITS_MAX:
            one = self._waiting.popleft()
            if not one.answer.done():
                batch.append(one)
        return batch


def _resolve(answer: asyncio.Future[jobs_pb2.SubmitResponse], result: jobs_pb2.SubmitResult) -> None:
    if answer.done():
        return  # its caller has gone
    if result.error_json:
        answer.set_exception(_decode_error(result.error_json).raised())
    else:
        answer.set_result(result.taken)
