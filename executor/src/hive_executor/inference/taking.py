"""Model calls of the pool that this device serves: `hive.exec.<id>.infer`, answered on `stream.<call>`."""

import asyncio
import logging
from typing import Final, get_args

import msgspec
from hive_common.contracts.messages import InferRequest, infer_subject, stream_subject
from hive_common.inference.calls import Answer, Completer, Endpoint, ModelCall
from hive_common.inference.chunks import Sender
from hive_common.inference.parts import Assembly
from hive_common.kernel.errors import HiveError, InvalidArgument, RateLimited, Unavailable
from nats.aio.msg import Msg
from nats.aio.subscription import Subscription

from hive_executor.link import Link
from hive_executor.metrics import MODEL_CALLS_RUNNING, MODEL_CALLS_TAKEN

log = logging.getLogger(__name__)

CALLS_MAX: Final = 64
BODIES_BYTES_MAX: Final = 64 << 20
"""Bodies that have come in part; what would be more is refused."""

PARTS_S_MAX: Final = 30.0
"""A body whose parts do not come within this is let go."""

CREDIT_MAX: Final = 4096
_CALL_CHARS_MAX: Final = 64
ENDPOINTS: Final[frozenset[str]] = frozenset(get_args(Endpoint))
_decode = msgspec.json.Decoder(InferRequest).decode


class _Taken:
    """One call on its way here, or running."""

    def __init__(self, sender: Sender) -> None:
        self.sender = sender
        self.assembly = Assembly()
        self.timer: asyncio.TimerHandle | None = None
        self.task: asyncio.Task[None] | None = None


class Taker:
    """Takes model calls of the pool.

    Args:
        link: to the control plane.
        completer: this device's own back ends; a call is never passed on from here.
        calls_max: calls that run or arrive at once; more are refused.
    """

    def __init__(self, link: Link, completer: Completer, calls_max: int = CALLS_MAX) -> None:
        self._link = link
        self._completer = completer
        self._calls_max = calls_max
        self._calls: dict[str, _Taken] = {}
        self._subscription: Subscription | None = None
        self._refused = ""

    async def open(self) -> None:
        """Take calls from now on."""
        subject = infer_subject(self._link.executor_id)
        self._subscription = await self._link.client.subscribe(subject, cb=self._receive)

    async def close(self) -> None:
        """Take nothing more, cancel what runs, and say so."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None and not self._link.client.is_closed:
            await subscription.unsubscribe()
        ending = tuple(self._calls.items())
        for call, taken in ending:
            self._let_go(call)
            if taken.task is not None:
                await asyncio.wait({taken.task})
            await taken.sender.fail(Unavailable("the device stops"))

    def refuse(self, reason: str) -> None:
        """Take no call from now on, for this reason, and end those that run; empty: take them again."""
        self._refused = reason
        if reason:
            for call in tuple(self._calls):
                self._let_go(call)

    async def _receive(self, message: Msg) -> None:
        try:
            request = _decode(message.data)
        except (msgspec.DecodeError, RecursionError) as error:
            log.warning("%s: %s", message.subject, error)
            return
        if request.op == "credit":
            if (taken := self._calls.get(request.call)) is not None:
                taken.sender.grant(min(request.credit, CREDIT_MAX))
        elif request.op == "cancel":
            self._let_go(request.call)
        elif request.call and len(request.call) <= _CALL_CHARS_MAX and "." not in request.call:
            try:
                self._part(request)
            except HiveError as error:
                self._let_go(request.call)
                MODEL_CALLS_TAKEN.labels(error.code).inc()
                await self._sender(request).fail(error)

    def _part(self, request: InferRequest) -> None:
        if request.v != 1:
            raise InvalidArgument(f"v is {request.v}; this device knows version 1")
        if request.op != "call" or request.endpoint not in ENDPOINTS:
            raise InvalidArgument(f"op is {request.op!r}, endpoint {request.endpoint!r}; this device knows neither")
        if self._refused:
            raise Unavailable(self._refused)
        taken = self._calls.get(request.call)
        if taken is None:
            if len(self._calls) >= self._calls_max:
                raise RateLimited(f"{self._calls_max} model calls run on this device already", retry_after_s=1)
            taken = self._calls[request.call] = _Taken(self._sender(request))
            taken.timer = asyncio.get_running_loop().call_later(PARTS_S_MAX, self._let_go, request.call)
        elif taken.task is not None:
            log.debug("call %s came twice", request.call)
            return
        body = taken.assembly.add(request)
        if sum(one.assembly.size for one in self._calls.values() if one.task is None) > BODIES_BYTES_MAX:
            raise RateLimited("too many long bodies are on their way to this device", retry_after_s=1)
        if body is not None:
            taken.assembly = Assembly()
            self._begin(taken, request, body)

    def _begin(self, taken: _Taken, request: InferRequest, body: bytes) -> None:
        if taken.timer is not None:
            taken.timer.cancel()
        call = ModelCall(
            id=request.call,
            endpoint=request.endpoint,  # type: ignore[arg-type]  # checked above
            model=request.model,
            body=body,
            stream=request.stream,
            deadline_ms=request.deadline_ms,
        )

        async def begin() -> Answer:
            return await self._completer.complete(call)

        async def serve() -> None:
            with MODEL_CALLS_RUNNING.track_inprogress():
                code = await taken.sender.run(begin, is_stream=call.stream)
            MODEL_CALLS_TAKEN.labels(code or "ok").inc()

        taken.task = asyncio.create_task(serve(), name=f"model call {call.id}")
        taken.task.add_done_callback(lambda task: self._ended(call.id, task))

    def _ended(self, call: str, task: asyncio.Task[None]) -> None:
        taken = self._calls.get(call)
        if taken is not None and taken.task is task:
            del self._calls[call]
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("model call %s failed", call, exc_info=error)

    def _let_go(self, call: str) -> None:
        taken = self._calls.pop(call, None)
        if taken is None:
            return
        if taken.timer is not None:
            taken.timer.cancel()
        if taken.task is not None and taken.task.cancel():
            MODEL_CALLS_TAKEN.labels("cancelled").inc()

    def _sender(self, request: InferRequest) -> Sender:
        subject = stream_subject(self._link.executor_id, request.call)
        return Sender(lambda data: self._link.publish(subject, data), min(request.credit, CREDIT_MAX))
