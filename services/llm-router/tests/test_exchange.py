"""Many calls on one connection, as the gateway makes them."""

import asyncio
import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest
from hive_common.kernel.errors import ErrorBody
from hive_common.kernel.ids import new_id
from hive_common.rpc.client import call
from hive_common.rpc.frames import Frames
from hive_common.testing.scripted import ScriptedBackEnd, text_of
from hive_proto.models.v1 import models_pb2 as pb
from hive_proto.models.v1 import models_pb2_grpc
from hive_router.exchange import AHEAD_BYTES

from .conftest import Answered, Log, Router


def request_of(
    model: str = "scripted", deadline_ms: int = 30_000, *, stream: bool = False, tokens: int = 0
) -> pb.ExchangeRequest:
    limits = {"max_tokens": tokens} if tokens else {}
    body = msgspec.json.encode({"model": model, "messages": [], "stream": stream, **limits})
    asked = pb.CompleteRequest(call_id=new_id(), endpoint="chat", model=model, body=body, stream=stream)
    return pb.ExchangeRequest(call=asked, deadline_ms=deadline_ms)


class Line:
    """The gateway's end of a connection, and all that has come on it."""

    def __init__(self) -> None:
        self.frames = Frames(pb.ExchangeResponse.FromString, self._took, self._lost)
        self.came: list[pb.ExchangeResponse] = []
        self.is_lost = False
        self._changed = asyncio.Condition()
        self._notes: set[asyncio.Task[None]] = set()

    def _took(self, message: pb.ExchangeResponse) -> None:
        self.came.append(message)
        self._note()

    def _lost(self) -> None:
        self.is_lost = True
        self._note()

    def _note(self) -> None:
        async def note() -> None:
            async with self._changed:
                self._changed.notify_all()

        task = asyncio.create_task(note())
        self._notes.add(task)
        task.add_done_callback(self._notes.discard)

    async def lost(self) -> None:
        async with self._changed:
            await self._changed.wait_for(lambda: self.is_lost)

    async def answer(self, request: pb.ExchangeRequest) -> list[pb.ExchangeResponse]:
        """Return the messages of an answer once it is whole. The test's timeout bounds it."""

        def of_it() -> list[pb.ExchangeResponse]:
            return [message for message in self.came if message.call_id == request.call.call_id]

        async with self._changed:
            await self._changed.wait_for(lambda: any(message.last for message in of_it()))
        return of_it()


async def opened(router: Router) -> tuple[Line, bytes, int]:
    stub = models_pb2_grpc.ExchangeStub(router.channel)
    told = await call(stub.Open(pb.OpenRequest(), metadata=router.key))
    line = Line()
    await asyncio.get_running_loop().create_connection(lambda: line.frames, router.config.grpc_host, told.port)
    return line, told.ticket, told.port


@pytest.fixture
async def line(router: Router) -> AsyncIterator[Line]:
    made, ticket, _ = await opened(router)
    made.frames.send(pb.ExchangeRequest(ticket=ticket))
    yield made
    made.frames.abort()


def answered_of(answer: list[pb.ExchangeResponse]) -> Answered:
    parts = [pb.CompleteResponse(chunk=message.chunk) for message in answer[1:]]
    return Answered(answer[0].call_id, [pb.CompleteResponse(head=answer[0].head), *parts])


def error_of(answer: list[pb.ExchangeResponse]) -> ErrorBody:
    return msgspec.json.decode(answer[-1].error_json, type=ErrorBody)


async def test_each_call_has_its_own_answer_or_error(line: Line) -> None:
    requests = [request_of(stream=number % 2 == 0) for number in range(10)] + [request_of("scriptet")]
    for request in requests:
        line.frames.send(request)
    assert error_of(await line.answer(requests[-1])).fields["nearest"] == ["scripted"]
    for request in requests[:-1]:
        answer = await line.answer(request)
        answered = answered_of(answer)
        assert answered.head.route == "local"
        if request.call.stream:
            assert answered.text == text_of(16) and answered.error is None
        else:
            assert len(answer) == 1 and answered.json["choices"][0]["message"]["content"] == text_of(16)


async def test_a_call_is_cancelled_alone_and_all_are_with_the_connection(
    line: Line, back_end: ScriptedBackEnd, log: Log
) -> None:
    back_end.play(tokens=100_000, pace_ms=5)
    first, second, third = request_of(), request_of(), request_of(stream=True)
    for request in (first, second, third):
        line.frames.send(request)
    await back_end.until(lambda: back_end.counts.active == 3)
    line.frames.send(pb.ExchangeRequest(cancel=first.call.call_id))
    await back_end.until(lambda: back_end.counts.cancelled == 1)
    assert back_end.counts.active == 2
    _, event = await log.call(first.call.call_id)
    assert event.code == "cancelled"
    line.frames.abort()
    await back_end.until(lambda: back_end.counts.cancelled == 3)


async def test_a_deadline_ends_one_call_and_the_others_go_on(line: Line, back_end: ScriptedBackEnd) -> None:
    back_end.play(tokens=100_000, pace_ms=5)
    late = request_of(deadline_ms=200)
    line.frames.send(late)
    assert error_of(await line.answer(late)).code == "deadline_exceeded"
    back_end.play(tokens=16, pace_ms=0)
    next_one = request_of()
    line.frames.send(next_one)
    assert (await line.answer(next_one))[-1].head.chunk


async def test_a_stream_waits_for_whoever_reads_and_another_passes_it(
    line: Line, back_end: ScriptedBackEnd
) -> None:
    tokens = 4 * AHEAD_BYTES // 100
    back_end.play(tokens=tokens)
    slow = request_of(stream=True)
    line.frames.send(slow)

    def size() -> int:
        mine = [message for message in line.came if message.call_id == slow.call.call_id]
        return sum(len(message.chunk or message.head.chunk) for message in mine)

    # What is ahead is bounded: by what may be, and one piece of it that the back end sent at once.
    await back_end.until(lambda: size() >= AHEAD_BYTES)
    before = size()
    back_end.play(tokens=16)
    for _ in range(3):
        passes = request_of(stream=True)
        line.frames.send(passes)
        await line.answer(passes)
    assert size() == before and not any(m.last for m in line.came if m.call_id == slow.call.call_id)
    line.frames.send(pb.ExchangeRequest(grant=slow.call.call_id, grant_bytes=100 * AHEAD_BYTES))
    answer = await line.answer(slow)
    assert answered_of(answer).text == text_of(tokens)


async def test_only_a_ticket_opens_it_and_only_once(router: Router, back_end: ScriptedBackEnd) -> None:
    line, ticket, port = await opened(router)
    line.frames.send(pb.ExchangeRequest(ticket=ticket))
    request = request_of()
    line.frames.send(request)
    assert (await line.answer(request))[-1].last
    generated = back_end.counts.completed
    for first in (
        pb.ExchangeRequest(ticket=ticket),
        pb.ExchangeRequest(ticket=b"guessed"),
        request_of(),
        pb.ExchangeRequest(ticket=b"long" * 1000),
    ):
        stranger = Line()
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda it=stranger: it.frames, router.config.grpc_host, port)  # type: ignore[misc]
        stranger.frames.send(first)
        with contextlib.suppress(ConnectionError):
            stranger.frames.send(request_of())
        await stranger.lost()
        assert stranger.came == []
    assert back_end.counts.completed == generated
    line.frames.abort()
