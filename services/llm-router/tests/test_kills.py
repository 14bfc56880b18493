"""Kill orders at the router: what is stopped calls no model, and what runs of it ends."""

import asyncio
from functools import partial
from typing import Any, cast

import msgspec
import pytest
from hive_common.contracts.events import Model
from hive_common.contracts.messages import StreamChunk, call_subject
from hive_common.control.kill_log import KillLog, stream_of
from hive_common.eventlog.log import LogReader
from hive_common.inference.calls import ModelCall
from hive_common.kernel.errors import PermissionDenied, Unavailable
from hive_common.kernel.ids import new_id
from hive_common.ops.config import ServiceConfig
from hive_common.rpc.client import stream
from hive_common.testing.kills import KillKey
from hive_common.testing.scripted import ScriptedBackEnd
from hive_router.admission import Admission
from hive_router.fleet import Fleet
from hive_router.flight import Flight
from hive_router.kills import refused
from hive_router.waterfall import Asker, Waterfall, Way

from .conftest import TOKENS, Log, Router, Start, piece_of
from .devices import Asking, Device, InferCall, token_event
from .test_executor_calls import joined

JOB = new_id()


@pytest.fixture
def kill_key() -> KillKey:
    return KillKey()


@pytest.fixture
def config(config: ServiceConfig, kill_key: KillKey) -> ServiceConfig:
    return msgspec.structs.replace(config, kill_public_key=kill_key.public)


async def order(log: Log, kill_key: KillKey, action: str, scope: str, target: str = "") -> None:
    """Write an order as the registry does."""
    event = kill_key.event(kill_key.give(action, scope, target))  # type: ignore[arg-type]
    await log.add(stream_of("default"), event)


async def error_of(device: Device, **claims: Any) -> str:
    """Return what a guest is told that asks for the model; the code, or nothing where it is answered."""
    token = TOKENS.token(device.id, **({"job": JOB, "agent": "square@1.0.0"} | claims))
    last = (await (await device.ask("scripted", token=token).begin()).all())[-1]
    return "" if last.error is None else f"{last.error.code}: {last.error.message}"


@pytest.mark.parametrize("scope", ["all", "agent", "executor", "job"])
async def test_a_guest_of_what_is_stopped_calls_no_model(
    start: Start, log: Log, back_end: ScriptedBackEnd, kill_key: KillKey, scope: str
) -> None:
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        assert await error_of(device) == ""
        target = {"all": "", "agent": "square", "executor": device.id, "job": JOB}[scope]
        await order(log, kill_key, "kill", scope, target)
        while not (said := await error_of(device)):
            await asyncio.sleep(0.01)
        assert said.startswith("permission_denied: ") and "is stopped by kill order 1" in said
        if scope in ("agent", "job"):
            assert await error_of(device, job=new_id(), agent="other@1.0.0") == ""
        await order(log, kill_key, "lift", scope, target)
        while await error_of(device, kill_epoch=2):
            await asyncio.sleep(0.01)
        # Attempts that began before it was stopped have ended with that; a device that kept a token says otherwise.
        for epoch in (0, 1):
            said = await error_of(device, kill_epoch=epoch)
            expected = "" if epoch else "was stopped by a kill order since this attempt began, and ended with that"
            assert said.endswith(expected) and bool(said) is bool(expected)


@pytest.mark.parametrize("scope", ["agent", "executor", "job"])
async def test_what_runs_of_what_is_stopped_ends_by_what_its_token_says(
    start: Start, log: Log, back_end: ScriptedBackEnd, kill_key: KillKey, scope: str
) -> None:
    back_end.play(hang_after=2)
    async with start(model_urls=[back_end.url]) as router, router.device(new_id()) as device:
        await joined(router, log, device)
        token = TOKENS.token(device.id, job=JOB, agent="square@1.0.0")
        other = TOKENS.token(device.id, job=new_id(), agent="other@1.0.0")
        running = []
        for shown, streams in ((token, True), (token, False), (other, True)):
            # What a device says beside its token is its own word, and says nothing.
            asking = device.ask("scripted", stream=streams, token=shown, tokens_max=100)
            body = msgspec.json.decode(msgspec.json.encode(asking.request))
            body |= {"job": new_id(), "task": "t", "agent": "innocent@1.0.0", "executor": new_id()}
            await device.client.subscribe(asking.reply, cb=asking._receive)
            await device.client.publish(call_subject(device.id, "model"), msgspec.json.encode(body), asking.reply)
            running.append(asking)
        await back_end.until(lambda: len(back_end.generations) == 3)
        streamed, gathered, innocent = running
        begun = [await streamed.chunks.get()]
        target = {"agent": "square", "executor": device.id, "job": JOB}[scope]
        await order(log, kill_key, "kill", scope, target)
        said = b"".join(chunk.data.encode() for chunk in await streamed.all_after(begun))
        assert b"is stopped by kill order 1" in said
        (only,) = await gathered.all()
        assert only.error is not None and only.error.code == "permission_denied"
        ended = 3 if scope == "executor" else 2
        await back_end.until(lambda: [one.outcome for one in back_end.generations].count("cancelled") == ended)
        if scope != "executor":
            assert "is stopped" not in "".join(chunk.data for chunk in _had(innocent))


def _had(asking: Asking) -> list[StreamChunk]:
    return [asking.chunks.get_nowait() for _ in range(asking.chunks.qsize())]


async def test_what_is_asked_of_a_device_that_is_stopped_ends_and_goes_to_no_such_device_again(
    start: Start, log: Log, kill_key: KillKey
) -> None:
    async def play(call: InferCall) -> None:
        await call.say_with_credit(token_event(0))

    async with start() as router, router.device(new_id(), play) as device:
        await joined(router, log, device, Model(name="own", backend="ollama"))
        pending = stream(router.begin("own", stream=True, timeout=60))
        assert b"0" in piece_of(await anext(pending))
        await order(log, kill_key, "kill", "executor", device.id)
        # It would send for ever, whatever it was told.
        assert b"the device has gone" in b"".join([piece_of(message) async for message in pending])
        call_id = new_id()
        with pytest.raises(Unavailable, match="a kill order stops it"):
            await router.complete("own", call_id=call_id)
        assert [one.rejected for one in (await router.explain(call_id)).candidates] == ["killed", "cloud_off"]
        assert len(device.calls) == 1
        await order(log, kill_key, "lift", "executor", device.id)
        device.play = InferCall.answer
        while True:
            try:
                answered = await router.complete("own")
            except Unavailable:
                await asyncio.sleep(0.01)
                continue
            assert answered.head.executor == device.id
            return


async def test_an_order_that_comes_while_a_model_is_looked_for_holds(
    start: Start, log: Log, back_end: ScriptedBackEnd, kill_key: KillKey
) -> None:
    kills = KillLog(cast(LogReader, None), "default", kill_key.public)
    ended: list[Flight] = []

    async def missing() -> None:
        kills.verifier.take(kill_key.kill("all"))

    waterfall = Waterfall(
        Fleet(),
        cast(Admission, None),
        host=cast(Way, None),
        pool=cast(Way, None),
        host_executors=frozenset(),
        begun=ended.append,
        finished=ended.append,
        missing=missing,
        refused=partial(refused, kills),
    )
    call = ModelCall(id=new_id(), endpoint="chat", model="m", body=b"{}", stream=False, deadline_ms=1_000)
    with pytest.raises(PermissionDenied, match="everything"):
        await waterfall.complete(call, Asker("owner", "caller", "caller"))
    assert not ended


async def test_a_stream_that_nothing_comes_of_any_more_ends_when_everything_is_stopped(
    router: Router, log: Log, back_end: ScriptedBackEnd, kill_key: KillKey
) -> None:
    back_end.play(hang_after=2)
    call = router.begin(stream=True, timeout=60)
    messages = stream(call)
    await anext(messages)
    await order(log, kill_key, "kill", "all")
    rest = b"".join([piece_of(message) async for message in messages])
    assert b"everything is stopped by kill order 1" in rest and b"permission_denied" in rest
    with pytest.raises(PermissionDenied, match="everything is stopped"):
        await router.complete()


async def test_an_answer_that_is_being_gathered_is_not_waited_for(
    router: Router, log: Log, back_end: ScriptedBackEnd, kill_key: KillKey
) -> None:
    back_end.play(hang_after=2)
    asking = asyncio.create_task(router.complete(timeout=60))
    await back_end.until(lambda: bool(back_end.calls))
    await order(log, kill_key, "kill", "all")
    with pytest.raises(PermissionDenied, match="everything is stopped by kill order 1"):
        await asking
