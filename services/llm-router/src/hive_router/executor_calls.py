"""`hive.exec.<id>.call.model`: executors that ask for a model beyond their own device, by the same waterfall."""

import asyncio
import logging
import time
from typing import Final

import msgspec
from hive_common.bus.allowance import Allowances, Verdict
from hive_common.contracts.messages import ModelCallRequest, StreamChunk, call_subject, inbox_prefix
from hive_common.inference.calls import BODY_BYTES_MAX, PATHS, PIN_ANY, Answer, ModelCall, narrowed
from hive_common.kernel.errors import (
    Conflict,
    HiveError,
    InvalidArgument,
    PayloadTooLarge,
    PermissionDenied,
    RateLimited,
    Unavailable,
    body_of,
)
from hive_common.kernel.ids import is_id
from nats.aio.client import Client
from nats.aio.msg import Msg

from hive_router.devices import Devices
from hive_router.metrics import ASKED
from hive_router.parts import parts_of
from hive_router.recorder import Recorder
from hive_router.settings import RouterSettings
from hive_router.waterfall import Asker, Waterfall

log = logging.getLogger(__name__)

PARTS_MAX: Final = 64
CREDIT_MAX: Final = 4_096
DEADLINE_MS_MAX: Final = 3_600_000
BODY_WITHIN_S: Final = 30.0
"""All parts of a body have to come within this time."""

_decode = msgspec.json.Decoder(ModelCallRequest).decode
_encode = msgspec.json.Encoder().encode


class _Asked:
    """A call of an executor: first its body comes, then its answer goes."""

    __slots__ = ("bytes", "credit", "executor", "first", "more", "parts", "reply", "sequence", "task")

    def __init__(self, executor: str, reply: str, first: ModelCallRequest) -> None:
        self.executor = executor
        self.reply = reply
        self.first = first
        self.parts: list[str] = []
        self.bytes = self.sequence = 0
        self.credit = min(first.credit, CREDIT_MAX)
        self.more = asyncio.Event()
        self.task: asyncio.Task[None] | None = None


class ExecutorCalls:
    """Answers calls of executors.

    A reply subject outside of the caller's own inbox is dropped, as is a flood; what one executor may have here at
    once is bounded in number and in bytes.

    Args:
        client: connection to NATS.
        waterfall: makes the calls.
        recorder: knows which ids were used.
        devices: knows whose device an executor is.
        settings: bounds.
    """

    def __init__(
        self, client: Client, waterfall: Waterfall, recorder: Recorder, devices: Devices, settings: RouterSettings
    ) -> None:
        self._client = client
        self._waterfall = waterfall
        self._recorder = recorder
        self._devices = devices
        self._settings = settings
        self._calls: dict[str, dict[str, _Asked]] = {}
        self._allowances = Allowances(time.monotonic)

    async def open(self) -> None:
        """Listen."""
        await self._client.subscribe(call_subject("*", "model"), cb=self._receive)

    async def close(self) -> None:
        """Cancel what runs."""
        for executor in list(self._calls):
            self.gone(executor)

    def gone(self, executor: str) -> None:
        """Cancel the calls of a device that is not there any more: nobody waits for their answers."""
        for asked in list(self._calls.get(executor, {}).values()):
            self._drop(asked)

    async def _receive(self, message: Msg) -> None:
        executor = message.subject.split(".")[2]
        verdict = self._allowances.ask(executor, len(message.data))
        if verdict is not Verdict.TAKE:
            ASKED.labels("flood").inc()
            return
        self._allowances.done(executor)
        try:
            request = _decode(message.data)
        except (msgspec.DecodeError, RecursionError):
            ASKED.labels("malformed").inc()
            return
        known = self._calls.get(executor, {}).get(request.call)
        match request.op:
            case "credit" if known is not None and request.credit > 0:
                known.credit = min(known.credit + request.credit, CREDIT_MAX)
                known.more.set()
            case "cancel" if known is not None:
                self._drop(known)
            case "call":
                await self._called(executor, message.reply, request, known)

    async def _called(self, executor: str, reply: str, request: ModelCallRequest, known: _Asked | None) -> None:
        if not reply.startswith(inbox_prefix(executor) + "."):
            ASKED.labels("foreign_reply").inc()
            log.warning("call.model of %s: reply subject outside of the caller's inbox, dropped", executor)
            return
        asked = known or _Asked(executor, reply, request)
        try:
            if known is None:
                self._admit(asked)
            self._take(asked, request)
        except HiveError as error:
            ASKED.labels(error.code).inc()
            self._drop(asked)
            await self._send(asked, StreamChunk(sequence=asked.sequence, error=body_of(error), end=True))

    def _admit(self, asked: _Asked) -> None:
        """Take a call in.

        Raises:
            InvalidArgument, PermissionDenied, Conflict, RateLimited: it cannot be.
        """
        request, executor = asked.first, asked.executor
        if not is_id(request.call):
            raise InvalidArgument("call: expected a UUID", path="call")
        if self._devices.owner_of(executor) is None:
            raise PermissionDenied("this executor is not known here, or was revoked")
        # Whoever took an id that is in use could write the record of a call that is not its own.
        if self._recorder.knows(request.call):
            raise Conflict(f"there was a call {request.call} already")
        mine = self._calls.setdefault(executor, {})
        if len(mine) >= self._settings.executor_calls_max:
            raise RateLimited(f"{len(mine)} calls of this executor run already", retry_after_s=1)
        mine[request.call] = asked
        asyncio.get_running_loop().call_later(BODY_WITHIN_S, self._drop_unless_whole, asked)

    def _take(self, asked: _Asked, request: ModelCallRequest) -> None:
        if asked.task is not None or request.part != len(asked.parts) or not 1 <= request.parts <= PARTS_MAX:
            raise InvalidArgument(f"part {request.part} of {request.parts}: not the one that was due", path="part")
        asked.parts.append(request.body)
        # Characters, of which none has less than a byte: a first bound that costs nothing.
        asked.bytes += len(request.body)
        if asked.bytes > BODY_BYTES_MAX:
            raise PayloadTooLarge(f"body: at most {BODY_BYTES_MAX} bytes are taken here")
        if sum(one.bytes for one in self._calls[asked.executor].values()) > self._settings.executor_bytes_max:
            raise RateLimited("the calls of this executor hold too many bytes already", retry_after_s=1)
        if request.part + 1 == request.parts:
            call = self._call_of(asked)
            asked.parts = []
            asked.task = asyncio.create_task(self._serve(asked, call), name=f"call {call.id}")

    def _call_of(self, asked: _Asked) -> ModelCall:
        request = asked.first
        endpoint = request.endpoint
        if endpoint not in PATHS:
            raise InvalidArgument(f"endpoint: got {endpoint!r}; expected {', '.join(PATHS)}", path="endpoint")
        if not request.model:
            raise InvalidArgument("model: expected a name", path="model")
        if not 0 < request.deadline_ms <= DEADLINE_MS_MAX:
            raise InvalidArgument(f"deadline_ms: expected 1 to {DEADLINE_MS_MAX}", path="deadline_ms")
        return ModelCall(
            id=request.call,
            endpoint=endpoint,
            model=request.model,
            body="".join(asked.parts).encode(),
            stream=request.stream,
            deadline_ms=request.deadline_ms,
            caller=self._devices.owner_of(asked.executor) or "",
            pin=narrowed(PIN_ANY, request.pin),
            origin=asked.executor,
            job=request.job,
            task=request.task,
            attempt=request.attempt,
            tokens_max=request.tokens_max,
        )

    async def _serve(self, asked: _Asked, call: ModelCall) -> None:
        """Make the call and send its answer, or what went wrong."""
        code = "ok"
        try:
            asker = Asker(owner=call.caller, subject=call.caller, actor=asked.executor)
            answer = await self._waterfall.complete(call, asker)
            try:
                await self._answer(asked, answer)
            finally:
                await answer.chunks.aclose()
        except Exception as error:
            code = body_of(error).code
            if not isinstance(error, HiveError):
                log.exception("call %s failed", call.id)
            await self._send(asked, StreamChunk(sequence=asked.sequence, error=body_of(error), end=True))
        finally:
            ASKED.labels(code).inc()
            self._forget(asked)

    async def _answer(self, asked: _Asked, answer: Answer) -> None:
        head = answer.head
        first = StreamChunk(
            sequence=0,
            status=head.status,
            content_type=head.content_type,
            route=head.route,
            executor=head.executor,
        )
        await self._send_next(asked, first)
        async for piece in answer.chunks:
            for text in parts_of(piece):
                await self._send_next(asked, StreamChunk(sequence=asked.sequence, data=text))
        await self._send_next(asked, StreamChunk(sequence=asked.sequence, end=True))

    async def _send_next(self, asked: _Asked, chunk: StreamChunk) -> None:
        while asked.credit <= 0:
            asked.more.clear()
            try:
                async with asyncio.timeout(self._settings.silence_ms / 1000):
                    await asked.more.wait()
            except TimeoutError:
                raise Unavailable("the caller did not take what was sent") from None
        asked.credit -= 1
        asked.sequence += 1
        await self._send(asked, chunk)

    async def _send(self, asked: _Asked, chunk: StreamChunk) -> None:
        # While NATS is away this waits in the client's buffer; what is lost there shows as a gap.
        if not self._client.is_closed:
            await self._client.publish(asked.reply, _encode(chunk))

    def _drop_unless_whole(self, asked: _Asked) -> None:
        if asked.task is None:
            self._drop(asked)

    def _drop(self, asked: _Asked) -> None:
        if asked.task is not None:
            asked.task.cancel()
        self._forget(asked)

    def _forget(self, asked: _Asked) -> None:
        mine = self._calls.get(asked.executor, {})
        if mine.get(asked.first.call) is asked:
            del mine[asked.first.call]
            if not mine:
                del self._calls[asked.executor]
