import asyncio
from typing import Any

import msgspec
import pytest
from hive_common.bus.nats import connect
from hive_common.contracts.events import ExecutorDrainRequested, ExecutorRegistered, ExecutorRevoked, Model, Power
from hive_common.contracts.messages import StreamChunk, stream_subject
from hive_common.kernel.errors import ErrorBody, InvalidArgument, NotFound, RateLimited, Unavailable
from hive_common.kernel.ids import new_id
from hive_common.testing.identities import EVERYTHING
from hive_common.testing.scripted import text_of

from .conftest import Log, Router, Start, capabilities, piece_of
from .devices import Device, InferCall, token_event

SMALL = Model(name="small", backend="ollama", loaded=True)


async def known(router: Router, log: Log, *executors: str, owner: str = "owner", **changes: Any) -> None:
    """Make executors with the model `small` known, and wait until the router has them all."""
    for number, executor in enumerate(executors):
        event = ExecutorRegistered(name=f"laptop-{number}", capabilities=capabilities(SMALL, **changes))
        await log.add(executor, event, owner=owner)
    await router.models_once(lambda found: any(set(executors) <= set(one.executors) for one in found))


async def outcome(router: Router) -> str:
    try:
        await router.complete("small")
    except (NotFound, Unavailable) as error:
        return error.message
    return "succeeded"


async def test_a_device_answers_whole_and_in_a_stream(start: Start, log: Log) -> None:
    executor = new_id()
    async with start() as router, router.device(executor):
        await known(router, log, executor)
        whole = await router.complete("small")
        assert (whole.head.route, whole.head.executor) == ("pool", executor)
        assert whole.json["choices"][0]["message"]["content"] == text_of(16)
        streamed = await router.complete("small", stream=True)
        assert (streamed.text, streamed.events[-1]) == (text_of(16), b"[DONE]")
        assert b'"usage"' not in streamed.body
        _, event = await log.call(streamed.id)
        assert (event.route, event.executor, event.completion_tokens) == ("pool", executor, 16)


async def test_a_device_never_learns_the_id_of_a_call(start: Start, log: Log) -> None:
    executor = new_id()
    async with start() as router, router.device(executor) as device:
        await known(router, log, executor)
        answered = await router.complete("small")
        assert answered.id not in device.calls
        assert answered.id.encode() not in b"".join(call.body.encode() for call in device.calls.values())


async def test_a_long_body_goes_in_parts(start: Start, log: Log) -> None:
    executor = new_id()
    text = 'añ€𝄞\n"' * 300_000
    async with start() as router, router.device(executor) as device:
        await known(router, log, executor)
        await router.complete("small", body={"messages": [{"role": "user", "content": text}]})
        call = next(iter(device.calls.values()))
        assert call.parts > 5
        assert msgspec.json.decode(call.body)["messages"][0]["content"] == text


async def test_a_device_is_never_further_ahead_than_its_credit(start: Start, log: Log) -> None:
    executor = new_id()
    said: list[int] = []

    async def play(call: InferCall) -> None:
        for number in range(1_000):
            await call.say_with_credit(token_event(number))
            said.append(number)
        await call.say_with_credit("data: [DONE]\n\n", end=True)

    async with start(credit=8) as router, router.device(executor, play) as device:
        await known(router, log, executor)
        pending = router.begin("small", stream=True, timeout=60)
        text, seen = b"", 0
        async for message in pending:
            text += piece_of(message)
            seen = text.count(b"data: {")
            # What gRPC and the router have taken is ahead of this reader too, so only the end can be exact.
        assert (seen, len(said)) == (1_000, 1_000)
        assert next(iter(device.calls.values())).sequence == 1_001


async def test_a_device_that_ignores_its_credit_is_cut_off(start: Start, log: Log) -> None:
    executor = new_id()
    first_came = asyncio.Event()

    async def flood(call: InferCall) -> None:
        await call.say(token_event(0))
        await first_came.wait()
        for number in range(50_000):
            await call.say(token_event(number))
            if call.cancelled.is_set():
                return

    async with start(credit=4) as router, router.device(executor, flood) as device:
        await known(router, log, executor)
        said = b""
        async for message in router.begin("small", stream=True):
            said += piece_of(message)
            if piece_of(message):
                first_came.set()
        assert b"more than it was asked for" in said.split(b"\n\n")[-2]
        await next(iter(device.calls.values())).cancelled.wait()


async def test_a_gap_ends_the_stream_with_an_error(start: Start, log: Log) -> None:
    executor = new_id()

    async def play(call: InferCall) -> None:
        await call.say(token_event(0))
        await call.say(token_event(1))
        await call.say(token_event(3), sequence=3)

    async with start() as router, router.device(executor, play):
        await known(router, log, executor)
        answered = await router.complete("small", stream=True)
        assert answered.error is not None and "piece 2" in answered.error["message"]
        _, event = await log.call(answered.id)
        assert event.code == "unavailable"


async def test_a_device_that_takes_a_call_and_says_nothing_is_passed_over(start: Start, log: Log) -> None:
    silent, serves = new_id(), new_id()

    async def say_nothing(call: InferCall) -> None:
        await call.cancelled.wait()

    async with (
        start(first_byte_ms=300) as router,
        router.device(silent, say_nothing) as device,
        router.device(serves),
    ):
        await known(router, log, silent)
        tired = capabilities(SMALL, power=Power(battery_percent=50, charging=False))
        await log.add(serves, ExecutorRegistered(name="tired", capabilities=tired))
        await router.models_once(lambda found: len(found[0].executors) == 2)
        answered = await router.complete("small", stream=True)
        assert (answered.head.executor, answered.text) == (serves, text_of(16))
        await next(iter(device.calls.values())).cancelled.wait()


async def test_a_device_that_loses_its_connection_ends_the_stream_with_an_error(start: Start, log: Log) -> None:
    executor = new_id()

    async def play(call: InferCall) -> None:
        await call.say(token_event(0))
        await call.device.client.flush()
        await call.device.client.close()

    async with start() as router, router.device(executor, play):
        await known(router, log, executor)
        answered = await router.complete("small", stream=True)
        assert answered.text == "0 "
        assert answered.error is not None and "it is not connected" in answered.error["message"]


async def test_only_the_device_that_was_asked_is_heard(start: Start, log: Log) -> None:
    executor, liar = sorted([new_id(), new_id()])
    forged: list[Device] = []

    async def play(call: InferCall) -> None:
        await call.say(token_event(0))
        chunk = StreamChunk(sequence=1, data=token_event(99))
        await forged[0].publish(stream_subject(liar, call.request.call), chunk)
        await forged[0].client.flush()
        await call.say(token_event(1))
        await call.say("data: [DONE]\n\n", end=True)

    async with (
        start() as router,
        router.device(executor, play),
        router.device(liar) as other,
    ):
        forged.append(other)
        await known(router, log, executor)
        answered = await router.complete("small", stream=True)
        assert (answered.text, answered.error) == ("0 1 ", None)


async def test_cancelling_the_call_cancels_it_at_the_device(start: Start, log: Log) -> None:
    executor = new_id()

    async def play(call: InferCall) -> None:
        await call.say(token_event(0))

    async with start() as router, router.device(executor, play) as device:
        await known(router, log, executor)
        pending = router.begin("small", stream=True)
        async for message in pending:
            if piece_of(message):
                break
        pending.cancel()
        await next(iter(device.calls.values())).cancelled.wait()


async def test_before_the_first_byte_the_next_device_is_tried(start: Start, log: Log) -> None:
    fails, serves = new_id(), new_id()

    async def refuse(call: InferCall) -> None:
        error = ErrorBody("rate_limited", "busy", retryable=True)
        await call.say(error=error, end=True)

    async with (
        start() as router,
        router.device(fails, refuse) as device,
        router.device(serves),
    ):
        # What is charged is preferred: the one that fails comes first.
        await known(router, log, fails)
        tired = capabilities(SMALL, power=Power(battery_percent=50, charging=False))
        await log.add(serves, ExecutorRegistered(name="tired", capabilities=tired))
        await router.models_once(lambda found: len(found[0].executors) == 2)
        answered = await router.complete("small", stream=True)
        assert (answered.head.executor, answered.text) == (serves, text_of(16))
        assert len(device.calls) == 1
        explained = await router.explain(answered.id)
        assert [(one.executor, one.tried) for one in explained.candidates] == [
            (fails, "rate_limited"),
            (serves, "succeeded"),
            ("", ""),
        ]


async def test_a_device_that_does_not_listen_is_passed_over(start: Start, log: Log) -> None:
    absent, serves = new_id(), new_id()
    async with start() as router, router.device(serves):
        await known(router, log, absent, serves)
        for _ in range(4):
            answered = await router.complete("small")
            assert answered.head.executor == serves


async def test_nobody_there_is_told_in_one_sentence(start: Start, log: Log) -> None:
    absent = new_id()
    async with start() as router:
        await known(router, log, absent)
        with pytest.raises(Unavailable, match="laptop-0: it is not connected"):
            await router.complete("small")


async def test_what_a_device_says_against_the_body_is_told_and_not_tried_elsewhere(start: Start, log: Log) -> None:
    first, second = new_id(), new_id()

    async def refuse(call: InferCall) -> None:
        await call.say(error=ErrorBody("invalid_argument", "temperature: too hot"), end=True)

    async with (
        start() as router,
        router.device(first, refuse) as one,
        router.device(second, refuse) as other,
    ):
        await known(router, log, first, second)
        with pytest.raises(InvalidArgument, match="too hot"):
            await router.complete("small")
        assert len(one.calls) + len(other.calls) == 1


async def test_after_the_first_byte_nobody_else_is_tried(start: Start, log: Log) -> None:
    first, second = new_id(), new_id()

    async def break_off(call: InferCall) -> None:
        await call.say(token_event(0))
        await call.say(error=ErrorBody("unavailable", "the power is gone", retryable=True), end=True)

    async with (
        start() as router,
        router.device(first, break_off) as one,
        router.device(second, break_off) as other,
    ):
        await known(router, log, first, second)
        answered = await router.complete("small", stream=True)
        assert answered.error is not None and "power is gone" in answered.error["message"]
        assert answered.body.count(b'"content"') == 1
        assert len(one.calls) + len(other.calls) == 1


@pytest.mark.parametrize(
    ("event", "reason"),
    [(ExecutorRevoked(), "`small` is not here"), (ExecutorDrainRequested(), "takes nothing new")],
)
async def test_a_device_that_is_out_gets_nothing(start: Start, log: Log, event: Any, reason: str) -> None:
    executor = new_id()
    async with start() as router, router.device(executor) as device:
        await known(router, log, executor)
        await log.add(executor, event)
        asked = 1
        while reason not in await outcome(router):  # until the view has it
            asked += 1
        for _ in range(5):
            assert reason in await outcome(router)
        # What was on its way to the device when it went may still arrive.
        assert len(device.calls) <= asked


async def test_a_device_that_is_revoked_while_it_answers_ends_the_stream_with_an_error(
    start: Start, log: Log
) -> None:
    executor = new_id()

    async def play(call: InferCall) -> None:
        await call.say(token_event(0))
        await log.add(executor, ExecutorRevoked())

    async with start() as router, router.device(executor, play):
        await known(router, log, executor)
        answered = await router.complete("small", stream=True)
        assert answered.error is not None and "has gone" in answered.error["message"]


async def test_pinned_to_own_devices_nothing_is_sent_anywhere_without_one(start: Start, log: Log) -> None:
    executor = new_id()
    heard: list[tuple[str, bytes]] = []

    async def hear(message: Any) -> None:
        heard.append((message.subject, message.data))

    async with start() as router, router.device(executor) as device:
        await known(router, log, executor, owner="somebody-else")
        # Every subject there is: what the router sends for this call would be seen here.
        ear = await connect(router.nats.issuer.service(EVERYTHING, router.folder), EVERYTHING)
        await ear.subscribe(">", cb=hear)
        await ear.flush()
        with pytest.raises(Unavailable, match="own-devices: no own device serves `small`"):
            await router.complete("small", pin="own-devices", body={"messages": [{"content": "the secret"}]})
        # A call that may go there follows it on the same connection: all before it has been heard then.
        await router.complete("small", pin="pool", body={"messages": [{"content": "the marker"}]})
        while not any(b"the marker" in data for _, data in heard):
            await asyncio.sleep(0.01)
        await ear.close()
        assert not any(b"the secret" in data for _, data in heard)
        assert sum(subject.endswith(".infer") and b'"op":"call"' in data for subject, data in heard) == 1
        assert len(device.calls) == 1


async def test_a_region_takes_only_its_devices(start: Start, log: Log) -> None:
    here, there = new_id(), new_id()
    async with start() as router, router.device(here), router.device(there):
        await known(router, log, there, labels={"region": "us"})
        await known(router, log, here, labels={"region": "eu"})
        for _ in range(3):
            assert (await router.complete("small", pin="region:eu")).head.executor == here
        with pytest.raises(Unavailable, match="region:asia: no device in asia serves `small`"):
            await router.complete("small", pin="region:asia")


async def test_a_line_that_is_full_says_when_to_come_back(start: Start, log: Log) -> None:
    executor = new_id()
    go_on = asyncio.Event()

    async def play(call: InferCall) -> None:
        await go_on.wait()
        await call.answer()

    async with (
        start(in_flight_max=1, queue_max=2) as router,
        router.device(executor, play) as device,
    ):
        await known(router, log, executor)
        calls = [asyncio.ensure_future(router.complete("small")) for _ in range(4)]
        done, waiting = await asyncio.wait(calls, return_when=asyncio.FIRST_COMPLETED)
        (refused,) = done
        error = refused.exception()
        assert isinstance(error, RateLimited) and error.fields["retry_after_s"] >= 1
        while not device.calls:  # until it has come there
            await asyncio.sleep(0.01)
        assert len(device.calls) == 1
        go_on.set()
        for one in waiting:
            assert (await one).json["choices"]
