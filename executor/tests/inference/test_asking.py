"""Where calls of a device go, and what becomes of them when the router, NATS or the caller goes."""

import asyncio
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hive_common.bus.authority import Authority
from hive_common.bus.nats import settled
from hive_common.contracts.budgets import SharedBudget
from hive_common.contracts.values import digest_of
from hive_common.inference.backends import BackEnds
from hive_common.inference.parts import PART_BYTES_MAX
from hive_common.inference.sse import DONE
from hive_common.kernel.errors import InvalidArgument, NotFound, Unavailable
from hive_common.testing.nats import EmbeddedNats
from hive_common.testing.scripted import ScriptedBackEnd, ScriptedModel, text_of

from .place import Place, Places, call, read, until


@pytest.fixture
async def far() -> ScriptedBackEnd:
    async with ScriptedBackEnd() as back_end:
        back_end.play(models=(ScriptedModel(name="far"),))
        yield back_end


async def with_far(places: Places, far: ScriptedBackEnd, *urls: str, **more: Any) -> Place:
    """Return a device whose router serves what `far` has."""
    place = await places.make(*urls, **more)
    back_ends = BackEnds([far.url])
    await back_ends.open()
    places.ends.append(back_ends.close)
    place.router.completer = back_ends
    return place


async def test_an_own_model_is_served_here_and_reported(places: Places, scripted: ScriptedBackEnd) -> None:
    place = await places.make(scripted.url)
    asked = call(seed=5)
    answer = await place.completer.complete(asked)
    assert (answer.head.route, answer.head.executor) == ("local", place.config.executor_id)
    body = msgspec.json.decode(await read(answer.chunks))
    await until(lambda: place.router.reports)
    (report,) = place.router.reports
    assert (report.call, report.endpoint, report.model, report.code) == (asked.id, "chat", "scripted", "")
    assert (report.prompt_tokens, report.completion_tokens) == (3, 16)
    assert report.request is not None and report.request.raw == asked.body
    assert report.response is not None and msgspec.json.decode(report.response.raw or b"") == body
    assert not place.router.asked and scripted.calls[0].body == asked.body


async def test_where_tokens_are_counted_for_others_too_the_router_is_asked_first(
    places: Places, scripted: ScriptedBackEnd, far: ScriptedBackEnd
) -> None:
    far.play(models=(ScriptedModel(name="scripted"),))
    place = await with_far(places, far, scripted.url)
    counted, money = (SharedBudget("job:j", tokens=5),), (SharedBudget("job:j", nano_usd=5),)
    await read((await place.completer.complete(msgspec.structs.replace(call(), budgets=counted))).chunks)
    assert (len(place.router.asked), len(scripted.calls), len(far.calls)) == (1, 0, 1)
    # It answers for itself that it costs nothing.
    await read((await place.completer.complete(msgspec.structs.replace(call(), budgets=money))).chunks)
    assert (len(place.router.asked), len(scripted.calls), len(far.calls)) == (1, 1, 1)


async def test_without_a_router_nothing_is_called_whose_tokens_it_counts(
    places: Places, scripted: ScriptedBackEnd
) -> None:
    place = await places.make(scripted.url)
    await place.router.go()
    asked = msgspec.structs.replace(call(), budgets=(SharedBudget("task:t", tokens=5),))
    with pytest.raises(Unavailable):
        await place.completer.complete(asked)
    assert not scripted.calls


async def test_a_stream_is_counted_though_its_caller_did_not_ask_for_that(
    places: Places, scripted: ScriptedBackEnd
) -> None:
    place = await places.make(scripted.url)
    answer = await place.completer.complete(call(stream=True))
    stream = await read(answer.chunks)
    assert b'"usage"' not in stream and stream.endswith(DONE)
    await until(lambda: place.router.reports)
    (report,) = place.router.reports
    assert (report.code, report.completion_tokens) == ("", 16)
    assert report.response is not None
    assert msgspec.json.decode(report.response.raw or b"")["choices"][0]["message"]["content"] == text_of(16)


async def test_where_only_counts_are_kept_no_text_leaves(places: Places, scripted: ScriptedBackEnd) -> None:
    place = await places.make(scripted.url, models_counts_only=True)
    await read((await place.completer.complete(call())).chunks)
    await until(lambda: place.router.reports)
    assert (place.router.reports[0].request, place.router.reports[0].response) == (None, None)
    assert place.router.reports[0].completion_tokens == 16


@pytest.mark.parametrize(("setting", "asked"), [(True, False), (False, True), (False, False)])
async def test_that_only_counts_are_kept_goes_to_the_router_with_the_call(
    places: Places, far: ScriptedBackEnd, setting: bool, asked: bool
) -> None:
    place = await with_far(places, far, models_counts_only=setting)
    wanted = msgspec.structs.replace(call("far"), counts_only=asked)
    await read((await place.completer.complete(wanted)).chunks)
    assert [one.counts_only for one in place.router.asked] == [setting or asked]


async def test_what_is_too_long_for_a_message_is_stored(places: Places, scripted: ScriptedBackEnd) -> None:
    place = await places.make(scripted.url)
    asked = call(padding="x" * 300_000)
    await read((await place.completer.complete(asked)).chunks)
    await until(lambda: place.router.reports)
    request = place.router.reports[0].request
    assert place.stored == [asked.body] and request is not None and request.digest == digest_of(asked.body)


async def test_a_client_that_goes_is_reported_as_such(places: Places, scripted: ScriptedBackEnd) -> None:
    scripted.play(tokens=1_000_000, pace_ms=1)
    place = await places.make(scripted.url)
    answer = await place.completer.complete(call(stream=True))
    await anext(answer.chunks)
    await answer.chunks.aclose()
    await scripted.until(lambda: scripted.counts.cancelled == 1)
    await until(lambda: place.router.reports)
    assert place.router.reports[0].code == "cancelled"


async def test_reports_wait_for_the_router_and_a_bad_one_does_not_keep_the_others(
    places: Places, scripted: ScriptedBackEnd
) -> None:
    place = await places.make(scripted.url)
    place.router.report_error = Unavailable("the log is away")
    for _ in range(20):
        await read((await place.completer.complete(call())).chunks)
    place.router.report_error = InvalidArgument("never")
    await until(lambda: not place.models.reports_waiting)
    place.router.report_error = None
    await read((await place.completer.complete(call())).chunks)
    await until(lambda: len(place.router.reports) == 1)


async def test_what_is_not_here_is_asked_of_the_router(places: Places, far: ScriptedBackEnd) -> None:
    place = await with_far(places, far)
    asked = call("far", padding='"é' * PART_BYTES_MAX)
    assert text_of(16).encode() in await read((await place.completer.complete(asked)).chunks)
    assert far.calls[0].body == asked.body
    far.play(tokens=500, pace_ms=0.2)
    stream = await read((await place.completer.complete(call("far", stream=True))).chunks)
    assert stream.endswith(DONE) and stream.count(b'"content":"') == 501
    assert not place.router.reports


async def test_the_list_has_both(places: Places, scripted: ScriptedBackEnd, far: ScriptedBackEnd) -> None:
    place = await with_far(places, far, scripted.url)
    assert [model.name for model in await place.completer.models()] == ["far", "scripted"]
    await place.router.go()
    (own,) = await place.completer.models()
    assert own.name == "scripted" and own.executors == (place.config.executor_id,)  # type: ignore[attr-defined]


async def test_a_client_that_goes_ends_the_generation_far_away(places: Places, far: ScriptedBackEnd) -> None:
    far.play(tokens=1_000_000, pace_ms=1)
    place = await with_far(places, far)
    answer = await place.completer.complete(call("far", stream=True))
    await anext(answer.chunks)
    gone_s = asyncio.get_running_loop().time()
    await answer.chunks.aclose()
    await far.until(lambda: far.counts.cancelled == 1)
    assert far.generations[0].ended_s - gone_s < 0.8  # four times the bound of 200 ms
    waiting = asyncio.create_task(place.completer.complete(call("far")))
    await far.until(lambda: far.counts.active == 1)
    waiting.cancel()
    await far.until(lambda: far.counts.cancelled == 2)


async def test_nobody_has_the_model(places: Places, scripted: ScriptedBackEnd) -> None:
    place = await places.make(scripted.url)
    with pytest.raises(NotFound):
        await place.completer.complete(call("nowhere"))


async def test_without_a_router_own_models_answer_and_others_are_unavailable_at_once(
    places: Places, scripted: ScriptedBackEnd
) -> None:
    place = await places.make(scripted.url)
    await place.router.go()
    with pytest.raises(Unavailable, match="router is not there"):
        await place.completer.complete(call("far"))
    assert await read((await place.completer.complete(call())).chunks)


async def test_a_router_that_dies_ends_the_stream_in_an_error_event(places: Places, far: ScriptedBackEnd) -> None:
    far.play(tokens=1_000_000, pace_ms=1)
    place = await with_far(places, far)
    answer = await place.completer.complete(call("far", stream=True))
    await anext(answer.chunks)
    await place.router.go()
    for sending in place.router.sending.values():
        sending.cancel()
    stream = await read(answer.chunks)
    assert b'data: {"error":' in stream and stream.endswith(b"\n\n") and DONE not in stream


async def test_the_router_serves_what_this_device_fails_at(
    places: Places, scripted: ScriptedBackEnd, far: ScriptedBackEnd
) -> None:
    far.play(models=(ScriptedModel(),))
    place = await with_far(places, far, scripted.url)
    scripted.play(error_status=503)
    await read((await place.completer.complete(call())).chunks)
    assert far.counts.completed == 1 and not place.router.reports
    place.router.completer = None
    with pytest.raises(Unavailable, match="scripted error"):
        await place.completer.complete(call())
    scripted.play(error_status=400)
    with pytest.raises(InvalidArgument, match="scripted error"):
        await place.completer.complete(call())
    assert far.counts.completed == 1


async def test_a_pin_to_another_region_keeps_a_call_from_this_device(
    places: Places, scripted: ScriptedBackEnd
) -> None:
    place = await places.make(scripted.url, labels={"region": "eu"})
    await read((await place.completer.complete(call(pin="region:eu"))).chunks)
    with pytest.raises(NotFound):
        await place.completer.complete(call(pin="region:us"))
    assert place.router.asked[0].pin == "region:us" and scripted.counts.completed == 1


async def test_streams_through_a_restart_of_nats_end_whole_or_in_an_error(
    far: ScriptedBackEnd, scripted: ScriptedBackEnd, tmp_path: Path
) -> None:
    nats = EmbeddedNats(tmp_path / "nats", authority=Authority.new())
    await asyncio.to_thread(nats.start)
    places = Places(nats, tmp_path)
    try:
        far.play(tokens=400, pace_ms=2)
        place = await with_far(places, far, scripted.url)
        answers = [await place.completer.complete(call("far", stream=True)) for _ in range(20)]
        reading = [asyncio.create_task(read(answer.chunks)) for answer in answers]
        await far.until(lambda: far.counts.tokens > 200)
        await asyncio.to_thread(nats.stop)
        assert await read((await place.completer.complete(call())).chunks)
        await asyncio.to_thread(nats.start)
        for stream in await asyncio.gather(*reading):
            numbers = [int(text) for text in _contents(stream).split()]
            assert numbers == list(range(len(numbers)))
            assert (stream.endswith(DONE) and len(numbers) == 400) or b'data: {"error":' in stream
        far.play(pace_ms=0)
        await until(lambda: place.link.is_connected and place.router.client.is_connected)
        await settled(place.router.client)
        assert await read((await place.completer.complete(call("far"))).chunks)
        # The call that was served meanwhile is not lost; it may be told again where the answer did not come.
        await until(lambda: len({report.call for report in place.router.reports}) == 1)
    finally:
        await places.close()
        await asyncio.to_thread(nats.stop)


def _contents(stream: bytes) -> str:
    found = ""
    for event in stream.split(b"\n\n"):
        if b'"choices":[{' in event:
            found += msgspec.json.decode(event.removeprefix(b"data: "))["choices"][0]["delta"].get("content") or ""
    return found
