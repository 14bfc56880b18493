"""Many calls on one stream, as the gateway makes them."""

from typing import Any

import grpc.aio
import msgspec
from hive_common.kernel.errors import ErrorBody
from hive_common.kernel.ids import new_id
from hive_common.testing.scripted import ScriptedBackEnd, text_of
from hive_proto.models.v1 import models_pb2 as pb
from hive_proto.models.v1 import models_pb2_grpc

from .conftest import Log, Router


def request_of(model: str = "scripted", call_id: str = "", deadline_ms: int = 30_000) -> pb.ExchangeRequest:
    body = msgspec.json.encode({"model": model, "messages": []})
    call = pb.CompleteRequest(call_id=call_id or new_id(), endpoint="chat", model=model, body=body)
    return pb.ExchangeRequest(call=call, deadline_ms=deadline_ms)


def opened(router: Router) -> Any:
    return models_pb2_grpc.ExchangeStub(router.channel).Calls(metadata=router.key)


async def answers_of(stream: Any, calls: int) -> dict[str, pb.ExchangeResponse]:
    found: dict[str, pb.ExchangeResponse] = {}
    while len(found) < calls:
        message = await stream.read()
        assert message is not grpc.aio.EOF
        if message.last:
            found[message.call_id] = message
    return found


async def test_each_call_has_its_own_answer_or_error(router: Router) -> None:
    stream = opened(router)
    requests = [request_of() for _ in range(10)] + [request_of("scriptet")]
    for request in requests:
        await stream.write(request)
    answers = await answers_of(stream, len(requests))
    assert answers.keys() == {request.call.call_id for request in requests}
    unknown = answers[requests[-1].call.call_id]
    assert msgspec.json.decode(unknown.error_json, type=ErrorBody).fields["nearest"] == ["scripted"]
    for request in requests[:-1]:
        head = answers[request.call.call_id].part.head
        whole = msgspec.json.decode(head.chunk)
        assert head.whole and head.route == "local"
        assert whole["choices"][0]["message"]["content"] == text_of(16)
    stream.cancel()


async def test_a_call_is_cancelled_alone_and_all_are_with_the_stream(
    router: Router, back_end: ScriptedBackEnd, log: Log
) -> None:
    back_end.play(tokens=100_000, pace_ms=5)
    stream = opened(router)
    first, second = request_of(), request_of()
    for request in (first, second):
        await stream.write(request)
    await back_end.until(lambda: back_end.counts.active == 2)
    await stream.write(pb.ExchangeRequest(cancel=first.call.call_id))
    await back_end.until(lambda: back_end.counts.cancelled == 1)
    assert back_end.counts.active == 1
    _, event = await log.call(first.call.call_id)
    assert event.code == "cancelled"
    stream.cancel()
    await back_end.until(lambda: back_end.counts.cancelled == 2)


async def test_a_deadline_ends_one_call_and_the_stream_goes_on(router: Router, back_end: ScriptedBackEnd) -> None:
    back_end.play(tokens=100_000, pace_ms=5)
    stream = opened(router)
    late = request_of(deadline_ms=200)
    await stream.write(late)
    answer = (await answers_of(stream, 1))[late.call.call_id]
    assert msgspec.json.decode(answer.error_json, type=ErrorBody).code == "deadline_exceeded"
    back_end.play(tokens=16, pace_ms=0)
    next_one = request_of()
    await stream.write(next_one)
    assert (await answers_of(stream, 1))[next_one.call.call_id].part.head.whole
    stream.cancel()
