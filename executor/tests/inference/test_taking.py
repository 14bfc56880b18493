"""Calls of the pool that a device serves: whole, in order, under credit, cancelled at once, and bounded."""

import asyncio

import msgspec
import pytest
from hive_common.contracts.messages import InferRequest, infer_subject
from hive_common.inference.parts import PART_BYTES_MAX
from hive_common.inference.sse import DONE
from hive_common.kernel.errors import InvalidArgument, NotFound, RateLimited
from hive_common.testing.scripted import ScriptedBackEnd, text_of
from nats.errors import NoRespondersError

from .place import Places, call, read, until


async def test_an_answer_arrives_whole(places: Places, scripted: ScriptedBackEnd) -> None:
    router = (await places.make(scripted.url)).router
    receiver = await router.infer(call())
    assert (await receiver.begun()).content_type == "application/json"
    body = await read(receiver)
    assert msgspec.json.decode(body)["choices"][0]["message"]["content"] == text_of(16)
    assert len(router.chunks) == 1


async def test_a_long_body_goes_in_parts_and_arrives_as_it_was(places: Places, scripted: ScriptedBackEnd) -> None:
    router = (await places.make(scripted.url)).router
    asked = call(padding='é"' * PART_BYTES_MAX)
    receiver = await router.infer(asked)
    await receiver.begun()
    await read(receiver)
    assert scripted.calls[0].body == asked.body


@pytest.mark.parametrize("credit", [1, 64])
async def test_a_stream_arrives_whole_and_in_order(places: Places, scripted: ScriptedBackEnd, credit: int) -> None:
    scripted.play(tokens=500, pace_ms=0.2)
    router = (await places.make(scripted.url)).router
    receiver = await router.infer(call(stream=True), credit=credit)
    assert (await receiver.begun()).content_type.startswith("text/event-stream")
    stream = await read(receiver)
    assert stream.endswith(DONE) and stream.count(b'"content":"') == 501


async def test_a_stream_nobody_reads_on_stays_within_its_credit(places: Places, scripted: ScriptedBackEnd) -> None:
    scripted.play(tokens=1_000_000)
    router = (await places.make(scripted.url)).router
    receiver = await router.infer(call(stream=True), credit=4)
    await receiver.begun()
    await until(lambda: len(router.chunks) == 4)
    await scripted.until(lambda: scripted.counts.paused > 0)
    assert len(router.chunks) == 4
    await receiver.aclose()
    await scripted.until(lambda: scripted.counts.cancelled == 1)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_that_nobody_waits_for_ends_at_the_back_end(
    places: Places, scripted: ScriptedBackEnd, stream: bool
) -> None:
    scripted.play(tokens=1_000_000, pace_ms=1)
    place = await places.make(scripted.url)
    asked = call(stream=stream)
    await place.router.infer(asked)
    await scripted.until(lambda: scripted.counts.active == 1)
    told_s = asyncio.get_running_loop().time()
    await place.router.tell(InferRequest(op="cancel", call=asked.id))
    await scripted.until(lambda: scripted.counts.cancelled == 1)
    assert scripted.generations[0].ended_s - told_s < 0.8  # four times the bound of 200 ms


async def test_what_the_back_end_says_arrives_as_an_error(places: Places, scripted: ScriptedBackEnd) -> None:
    router = (await places.make(scripted.url)).router
    with pytest.raises(NotFound) as raised:
        await (await router.infer(call("scriptet"))).begun()
    assert raised.value.fields["nearest"] == ["scripted"]
    scripted.play(context_tokens=1)
    with pytest.raises(InvalidArgument) as refused:
        await (await router.infer(call())).begun()
    assert refused.value.fields["reason"] == "context_length_exceeded"
    scripted.play(context_tokens=0, drop_after=3, pace_ms=1)
    receiver = await router.infer(call(stream=True))
    await receiver.begun()
    stream = await read(receiver)
    assert b'"content":"2 "' in stream and b'data: {"error":' in stream and DONE not in stream


async def test_more_calls_than_the_device_takes_are_refused(places: Places, scripted: ScriptedBackEnd) -> None:
    scripted.play(tokens=1_000_000, pace_ms=1)
    router = (await places.make(scripted.url, model_calls_max=2)).router
    running = [await router.infer(call(stream=True)) for _ in range(2)]
    for receiver in running:
        await receiver.begun()
    with pytest.raises(RateLimited) as raised:
        await (await router.infer(call(stream=True))).begun()
    assert raised.value.fields["retry_after_s"] == 1
    for receiver in running:
        await receiver.aclose()


@pytest.mark.parametrize(
    "wrong",
    [{"op": "other"}, {"endpoint": "images"}, {"part": 1, "parts": 2}, {"parts": 100_000}, {"v": 2}],
)
async def test_a_request_that_makes_no_sense_is_refused(
    places: Places, scripted: ScriptedBackEnd, wrong: dict[str, object]
) -> None:
    router = (await places.make(scripted.url)).router
    request = InferRequest(op="call", call="one", endpoint="chat", model="scripted", credit=1, deadline_ms=1000)
    await router.tell(msgspec.structs.replace(request, **wrong))
    await until(lambda: router.chunks)
    assert router.chunks[0].error is not None and router.chunks[0].error.code == "invalid_argument"
    assert not scripted.calls


async def test_a_device_that_stops_says_so(places: Places, scripted: ScriptedBackEnd) -> None:
    scripted.play(tokens=1_000_000, pace_ms=1)
    place = await places.make(scripted.url)
    receiver = await place.router.infer(call(stream=True))
    await receiver.begun()
    reading = asyncio.create_task(read(receiver))
    await place.models.disconnect()
    stream = await reading
    assert b'data: {"error":' in stream and b"stops" in stream
    await scripted.until(lambda: scripted.counts.cancelled == 1)
    with pytest.raises(NoRespondersError):
        await place.router.client.request(infer_subject(place.router.executor), b"{}")
