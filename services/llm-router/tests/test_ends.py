"""However a back end, the log, NATS or the time ends, callers are told, and nobody waits for ever."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import msgspec
import pytest
from hive_common.artifacts.store import FolderStore
from hive_common.bus.authority import Authority
from hive_common.contracts.events import ExecutorRegistered, Model
from hive_common.kernel.errors import DeadlineExceeded, InvalidArgument, NotFound, Unavailable
from hive_common.kernel.ids import new_id
from hive_common.ops.ports import free_port
from hive_common.testing.fixtures import Database
from hive_common.testing.nats import EmbeddedNats
from hive_common.testing.scripted import Script, ScriptedBackEnd, ScriptedModel, text_of
from hive_common.testing.services import running_service, service_config
from hive_proto.executors.v1 import executors_pb2, executors_pb2_grpc
from hive_router.bootstrap import main

from .conftest import Answered, Log, Router, Start, capabilities
from .devices import InferCall, token_event

SMALL = Model(name="small", backend="ollama", loaded=True)


async def test_a_back_end_that_fails_is_passed_over(start: Start, back_end: ScriptedBackEnd) -> None:
    back_end.play(error_status=500)
    async with ScriptedBackEnd(Script()) as good, start(model_urls=[back_end.url, good.url]) as router:
        answers = [await router.complete(stream=True) for _ in range(6)]
        assert [answered.text for answered in answers] == [text_of(16)] * 6
        assert len(good.calls) == 6


async def test_a_back_end_that_fails_again_and_again_is_left_alone_for_a_while(
    start: Start, back_end: ScriptedBackEnd
) -> None:
    back_end.play(error_status=500)
    breaker = {"failures": 2, "open_ms": 600_000, "open_ms_max": 600_000}
    async with start(model_urls=[back_end.url], breaker=breaker) as router:
        for _ in range(2):
            with pytest.raises(Unavailable, match="scripted error"):
                await router.complete()
        call_id = new_id()
        with pytest.raises(Unavailable, match="it failed again and again"):
            await router.complete(call_id=call_id)
        assert len(back_end.calls) == 2
        explanation = await router.explain(call_id)
        assert (explanation.outcome, explanation.candidates[0].rejected) == ("unavailable", "breaker")


async def test_a_stream_that_is_cut_off_ends_with_an_error_event(
    router: Router, back_end: ScriptedBackEnd, log: Log
) -> None:
    for trouble in ({"drop_after": 3}, {"stop_after": 3}, {"error_after": 3}):
        back_end.play(**{"drop_after": None, "stop_after": None, "error_after": None, **trouble})
        answered = await router.complete(stream=True)
        assert answered.text == text_of(3)
        assert answered.error is not None, trouble
        _, event = await log.call(answered.id)
        assert event.code == "unavailable"
        assert event.response is not None and event.response.raw is not None
        assert msgspec.json.decode(event.response.raw)["truncated"] is True


async def test_a_call_whose_time_is_up_ends_in_words(router: Router, back_end: ScriptedBackEnd, log: Log) -> None:
    back_end.play(hang_after=2)
    answered = await router.complete(stream=True, timeout=4)
    assert answered.text == text_of(2)
    assert answered.error is not None and answered.error["code"] == "deadline_exceeded"
    with pytest.raises(DeadlineExceeded, match="within"):
        await router.complete(timeout=4)
    await back_end.until(lambda: [one.outcome for one in back_end.generations] == ["cancelled"] * 2)
    _, event = await log.call(answered.id)
    assert event.code == "deadline_exceeded"


async def test_a_caller_that_leaves_while_it_waits_in_line_is_forgotten(
    start: Start, back_end: ScriptedBackEnd
) -> None:
    back_end.play(tokens=3, pace_ms=60_000)
    async with start(model_urls=[back_end.url], in_flight_max=1) as router:
        first = router.begin(stream=True)
        await first.read()
        second = router.begin(stream=True, call_id=(waiting := new_id()))
        while not (await explained(router, waiting)):
            await asyncio.sleep(0.01)
        second.cancel()
        while (await router.explain(waiting)).outcome == "running":
            await asyncio.sleep(0.01)
        first.cancel()
        back_end.play(pace_ms=0)
        assert (await router.complete(stream=True)).text == text_of(3)
        assert len(back_end.calls) == 2


async def explained(router: Router, call_id: str) -> bool:
    with contextlib.suppress(Exception):
        return bool((await router.explain(call_id)).candidates)
    return False


async def test_tools_go_only_to_a_model_that_has_them(start: Start, back_end: ScriptedBackEnd) -> None:
    plain = ScriptedModel(name="scripted", tools=False)
    async with ScriptedBackEnd(Script(flavour="llama.cpp", models=(plain,))) as without:
        tools = [{"type": "function", "function": {"name": "f"}}]
        async with start(model_urls=[without.url, back_end.url]) as router:
            for _ in range(3):
                answered = await router.complete(body={"tools": tools})
            await router.complete(body={"functions": [{"name": "f"}]})
            assert (len(without.calls), len(back_end.calls)) == (0, 4)
            # It was known before anybody had to refuse.
            told = (await router.explain(answered.id)).candidates
            assert [one.rejected for one in told if one.backend == without.url] == ["capability"]
        async with start(model_urls=[without.url]) as router:
            with pytest.raises(InvalidArgument, match="tools"):
                await router.complete(body={"tools": tools})


async def test_a_long_prompt_is_kept_by_its_digest(router: Router, log: Log) -> None:
    text = "x" * 300_000
    content = [{"type": "image_url", "image_url": {"url": text}}]
    answered = await router.complete(body={"messages": [{"role": "user", "content": content}]})
    _, event = await log.call(answered.id)
    assert event.request is not None and event.request.digest is not None
    kept = await FolderStore(router.config.artifacts_dir).get(event.request.digest)
    assert msgspec.json.decode(kept)["messages"][0]["content"] == content


async def test_a_device_that_the_scheduler_does_not_see_is_not_asked(start: Start, log: Log) -> None:
    executor = new_id()
    async with (
        presence() as (address, online),
        start(peers={"scheduler": address}, presence_ms=50, absent_ms=200) as router,
        router.device(executor) as device,
    ):
        await log.add(executor, ExecutorRegistered(name="laptop", capabilities=capabilities(SMALL)))
        message = ""
        while "does not pull" not in message:  # until the view has it, and it was absent for long enough
            try:
                await router.complete("small")
            except (NotFound, Unavailable) as error:
                message = error.message
        assert message == "no device can serve `small` now: laptop: it does not pull"
        calls = len(device.calls)
        with pytest.raises(Unavailable):
            await router.complete("small")
        assert len(device.calls) == calls
        online.add(executor)
        await router.models_once(bool)
        assert (await router.complete("small")).head.executor == executor


async def test_a_device_that_the_scheduler_loses_ends_its_streams(start: Start, log: Log) -> None:
    executor = new_id()

    async def play(call: InferCall) -> None:
        await call.say(token_event(0))
        online.clear()

    async with (
        presence() as (address, online),
        start(peers={"scheduler": address}, presence_ms=50, absent_ms=200) as router,
    ):
        online.add(executor)
        async with router.device(executor, play):
            await log.add(executor, ExecutorRegistered(name="laptop", capabilities=capabilities(SMALL)))
            await router.models_once(bool)
            answered = await router.complete("small", stream=True)
            assert answered.text == "0 "
            assert answered.error is not None and "has gone" in answered.error["message"]


class Online(set[str]):
    """Who is there, and how often somebody wanted to know."""

    asked = 0


@contextlib.asynccontextmanager
async def presence() -> AsyncIterator[tuple[str, Online]]:
    """A scheduler as far as presence goes; the set says who is there."""
    online = Online()

    class Servicer(executors_pb2_grpc.PresenceServicer):
        async def List(self, request: Any, context: Any) -> executors_pb2.PresenceResponse:
            online.asked += 1
            present = [executors_pb2.Present(executor_id=one, online=True) for one in online]
            return executors_pb2.PresenceResponse(executors=present)

    server = grpc.aio.server()
    executors_pb2_grpc.add_PresenceServicer_to_server(Servicer(), server)
    address = f"127.0.0.1:{free_port()}"
    server.add_insecure_port(address)
    await server.start()
    try:
        yield address, online
    finally:
        await server.stop(0)


async def test_nats_restarted_under_streams_ends_each_of_them(database: Database, tmp_path: Path, log: Log) -> None:
    nats = EmbeddedNats(tmp_path / "nats", authority=Authority.new())
    nats.start()
    executor, streams = new_id(), 20
    begun: list[InferCall] = []
    go_on = asyncio.Event()

    async def play(call: InferCall) -> None:
        await call.say_with_credit(token_event(0))
        begun.append(call)
        await go_on.wait()
        for number in range(1, 16):
            await call.say_with_credit(token_event(number))
        await call.say_with_credit("data: [DONE]\n\n", end=True)

    config = service_config("router", database, nats, tmp_path)
    try:
        async with running_service(main, config) as channel:
            router = Router(config, channel, nats)
            async with router.device(executor, play):
                await log.add(executor, ExecutorRegistered(name="laptop", capabilities=capabilities(SMALL)))
                await router.models_once(bool)
                calls = [asyncio.ensure_future(router.complete("small", stream=True)) for _ in range(streams)]
                while len(begun) < streams:
                    await asyncio.sleep(0.01)
                await asyncio.to_thread(nats.stop)
                go_on.set()
                await asyncio.to_thread(nats.start)
                for answered in await asyncio.gather(*calls):
                    assert whole_or_an_error(answered)
                assert whole_or_an_error(await until_it_serves(router))
    finally:
        nats.stop()


def whole_or_an_error(answered: Answered) -> bool:
    """Whether no token is lost, doubled or out of order, and the end is one."""
    return text_of(16).startswith(answered.text) and (answered.error is not None or answered.text == text_of(16))


async def until_it_serves(router: Router) -> Answered:
    while True:
        with contextlib.suppress(Unavailable):
            return await router.complete("small", stream=True)
        await asyncio.sleep(0.05)


async def test_a_scheduler_that_has_seen_nobody_yet_ends_no_stream(start: Start, log: Log) -> None:
    executor = new_id()

    async def play(call: InferCall) -> None:
        await call.say(token_event(0))
        online.clear()
        asked = online.asked
        while online.asked < asked + 3:
            await asyncio.sleep(0.01)
        online.add(executor)
        await call.say(token_event(1))
        await call.say("data: [DONE]\n\n", end=True)

    async with presence() as (address, online), start(peers={"scheduler": address}, presence_ms=50) as router:
        online.add(executor)
        async with router.device(executor, play):
            await log.add(executor, ExecutorRegistered(name="laptop", capabilities=capabilities(SMALL)))
            await router.models_once(bool)
            answered = await router.complete("small", stream=True)
            assert (answered.text, answered.error) == ("0 1 ", None)
