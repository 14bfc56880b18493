"""`hive.exec.<id>.call.model`: executors that ask for a model beyond their own device, by the same waterfall."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from typing import Final

import msgspec
from hive_common.bus.allowance import Allowance
from hive_common.bus.intake import Intake
from hive_common.contracts.messages import ModelCallRequest, call_subject, inbox_prefix
from hive_common.inference.calls import PATHS, PIN_ANY, Answer, Head, ModelCall, narrowed
from hive_common.inference.chunks import Sender
from hive_common.inference.parts import Assembly
from hive_common.kernel.errors import Conflict, HiveError, InvalidArgument, PermissionDenied, RateLimited
from hive_common.kernel.ids import is_id
from nats.aio.client import Client
from nats.aio.msg import Msg

from hive_router.devices import Devices
from hive_router.metrics import ASKED
from hive_router.recorder import Recorder
from hive_router.settings import RouterSettings
from hive_router.tokens import CapabilityTokens
from hive_router.waterfall import Asker, RoutedAnswer, Waterfall

log = logging.getLogger(__name__)

CREDIT_MAX: Final = 4_096
DEADLINE_MS_MAX: Final = 3_600_000
BODY_WITHIN_S: Final = 30.0
"""All parts of a body have to come within this time."""

_decode = msgspec.json.Decoder(ModelCallRequest).decode
_encode = msgspec.json.Encoder().encode


class _Asked:
    """A call of an executor: first its body comes, then its answer goes."""

    __slots__ = ("assembly", "executor", "first", "sender", "size", "task")

    def __init__(self, executor: str, first: ModelCallRequest, sender: Sender) -> None:
        self.executor = executor
        self.first = first
        self.sender = sender
        self.assembly = Assembly()
        self.size = 0
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
        tokens: read what guests show.
    """

    def __init__(
        self,
        client: Client,
        waterfall: Waterfall,
        recorder: Recorder,
        devices: Devices,
        settings: RouterSettings,
        tokens: CapabilityTokens,
    ) -> None:
        self._client = client
        self._waterfall = waterfall
        self._recorder = recorder
        self._devices = devices
        self._settings = settings
        self._tokens = tokens
        self._calls: dict[str, dict[str, _Asked]] = {}

    async def open(self) -> None:
        """Listen."""
        # One message for each part of a body, and for every half of the credit that was used up.
        allowance, subject = Allowance(in_flight=0), call_subject("*", "model")
        await Intake(self._client, subject, self._receive, self._flooded, allowance, self._devices.known).open()

    async def close(self) -> None:
        """Cancel what runs."""
        for executor in list(self._calls):
            self.gone(executor)

    def gone(self, executor: str) -> None:
        """Cancel the calls of a device that is not there any more: nobody waits for their answers."""
        for asked in list(self._calls.get(executor, {}).values()):
            self._drop(asked)

    async def _flooded(self, executor: str, message: Msg) -> None:
        ASKED.labels("flood").inc()

    async def _receive(self, executor: str, message: Msg) -> None:
        try:
            request = _decode(message.data)
        except (msgspec.DecodeError, RecursionError):
            ASKED.labels("malformed").inc()
            return
        known = self._calls.get(executor, {}).get(request.call)
        match request.op:
            case "credit" if known is not None:
                known.sender.grant(min(request.credit, CREDIT_MAX))
            case "cancel" if known is not None:
                self._drop(known)
            case "call" | "models":
                await self._called(executor, message.reply, request, known)

    async def _called(self, executor: str, reply: str, request: ModelCallRequest, known: _Asked | None) -> None:
        if not reply.startswith(inbox_prefix(executor) + "."):
            ASKED.labels("foreign_reply").inc()
            log.warning("call.model of %s: reply subject outside of the caller's inbox, dropped", executor)
            return
        asked = known or _Asked(executor, request, self._sender(reply, request.credit))
        try:
            if known is None:
                self._admit(asked)
            self._take(asked, request)
        except HiveError as error:
            ASKED.labels(error.code).inc()
            self._drop(asked)
            await asked.sender.fail(error)

    def _sender(self, reply: str, credit: int) -> Sender:
        async def publish(data: bytes) -> None:
            # While NATS is away this waits in the client's buffer; what is lost there shows as a gap.
            if not self._client.is_closed:
                await self._client.publish(reply, data)

        return Sender(publish, min(credit, CREDIT_MAX))

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
        if asked.task is not None:
            raise InvalidArgument("the body of this call had come already", path="part")
        body = asked.assembly.add(request)
        asked.size = asked.assembly.size
        if sum(one.size for one in self._calls[asked.executor].values()) > self._settings.executor_bytes_max:
            raise RateLimited("the calls of this executor hold too many bytes already", retry_after_s=1)
        if body is None:
            return
        asked.assembly = Assembly()
        call = None if request.op == "models" else self._call_of(asked, body)
        asked.task = asyncio.create_task(self._serve(asked, call), name=f"call {request.call}")

    def _call_of(self, asked: _Asked, body: bytes) -> ModelCall:
        request = asked.first
        endpoint = request.endpoint
        if endpoint not in PATHS:
            raise InvalidArgument(f"endpoint: got {endpoint!r}; expected {', '.join(PATHS)}", path="endpoint")
        if not request.model:
            raise InvalidArgument("model: expected a name", path="model")
        if not 0 < request.deadline_ms <= DEADLINE_MS_MAX:
            raise InvalidArgument(f"deadline_ms: expected 1 to {DEADLINE_MS_MAX}", path="deadline_ms")
        call = ModelCall(
            id=request.call,
            endpoint=endpoint,
            model=request.model,
            body=body,
            stream=request.stream,
            deadline_ms=request.deadline_ms,
            caller=self._devices.owner_of(asked.executor) or "",
            pin=narrowed(PIN_ANY, request.pin),
            counts_only=request.counts_only,
            origin=asked.executor,
            tokens_max=request.tokens_max,
        )
        return self._tokens.within(call, request.token) if request.token else call

    async def _serve(self, asked: _Asked, call: ModelCall | None) -> None:
        """Make the call, or list the models, and send what comes of it."""

        async def begin() -> Answer:
            if call is None:
                body = _encode(await self._waterfall.offered())
                return RoutedAnswer(Head(200, "application/json"), _once(body))
            asker = Asker(owner=call.caller, subject=call.caller, actor=asked.executor)
            return await self._waterfall.complete(call, asker)

        try:
            code = await asked.sender.run(begin, is_stream=call is not None and call.stream)
            ASKED.labels(code or "ok").inc()
        finally:
            self._forget(asked)

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


async def _once(body: bytes) -> AsyncGenerator[bytes, None]:
    yield body
