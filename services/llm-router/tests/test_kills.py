"""Kill orders at the router: what is stopped calls no model, and what runs of it ends."""

import asyncio

import msgspec
import pytest
from hive_common.control.kill_log import stream_of
from hive_common.kernel.errors import PermissionDenied
from hive_common.kernel.ids import new_id
from hive_common.ops.config import ServiceConfig
from hive_common.rpc.client import stream
from hive_common.testing.kills import KillKey
from hive_common.testing.scripted import ScriptedBackEnd

from .conftest import TOKENS, Log, Router, Start, piece_of
from .devices import Device
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


async def error_of(device: Device, **claims: str) -> str:
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
        while await error_of(device):
            await asyncio.sleep(0.01)


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
