"""An attempt that is cancelled ends its guest and keeps its runner, unless the guest does not end."""

import asyncio
import json
import os
import random
import select
import signal
import socket
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import pytest
from hive_common.contracts.permissions import ModelPermission
from hive_executor.host import ModelAccess
from hive_executor.sandbox import Capabilities, LogLine, Program, RunnerPool, frames, prepare_python_runtime
from hive_executor.sandbox.frames import HostAnswer, HostCall
from hive_executor.sandbox.runner_process import RunnerGone, _Channel, _leaving

from .conftest import MIB, limits, python
from .scripted import Scripted

Module = Callable[[str], Program]

SEED = int(os.environ.get("HIVE_CANCELS_SEED", "20261126"))
ECHO = python("def run(input):\n    return input")
LOOP = python("def run(input):\n    print('up')\n    while True: pass")
SLEEP = python("import time\ndef run(input):\n    print('up')\n    time.sleep(3600)")
AWAIT = python("import asyncio\nasync def run(input):\n    print('up')\n    await asyncio.sleep(3600)")
ASK = python("from hive import model\ndef run(input):\n    return {'text': model.chat('x').text}")
ASK_FOR_EVER = python(
    "from hive import model\n"
    "def run(input):\n"
    "    while True:\n"
    "        try:\n"
    "            model.chat('x')\n"
    "        except BaseException:\n"
    "            pass\n"
)


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave guests the time to end, however slow the machine is: no runner is killed for that."""
    monkeypatch.setattr("hive_executor.sandbox.pool.STOP_S_MAX", 60.0)


@pytest.fixture
async def two(cache_dir: Path) -> AsyncIterator[RunnerPool]:
    await prepare_python_runtime(cache_dir)
    pool = RunnerPool(size=2, cache_dir=cache_dir)
    await pool.start()
    yield pool
    await pool.close()


# So that no guest below ends by its limit first.
LONG = limits(wall_ms=600_000)


class Deaf:
    """A call that is not ended by being cancelled, and answers when it is let go."""

    def __init__(self, text: str) -> None:
        self._text = text
        self.begun = asyncio.Event()
        self.cancelled = asyncio.Event()
        self.lets_go = asyncio.Event()

    async def call(self, operation: str, request: bytes, left_ms: int) -> bytes:
        self.begun.set()
        try:
            await self.lets_go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            await self.lets_go.wait()
        return json.dumps({"choices": [{"message": {"role": "assistant", "content": self._text}}]}).encode()


def granted(completer: Scripted) -> Capabilities:
    return {"model": ModelAccess(completer, ModelPermission(("small",), 100))}


async def cancelled(attempt: "asyncio.Task[object]") -> None:
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt


async def until_up(pool: RunnerPool, program: Program) -> "asyncio.Task[object]":
    up = asyncio.Event()
    attempt = asyncio.create_task(pool.run(program, b"{}", LONG, on_log=lambda _: up.set()))
    async with asyncio.timeout(30):
        await up.wait()
    return attempt


async def serves_as_before(pool: RunnerPool, pids: list[int]) -> None:
    assert (pool.stats()["pids"], pool.stats()["busy"], pool.stats()["restarts"]) == (pids, 0, 0)
    assert (await pool.run(ECHO, b'{"n":1}', limits())).output == b'{"n":1}'
    assert (pool.stats()["pids"], pool.stats()["restarts"]) == (pids, 0)


@pytest.mark.usefixtures("unhurried")
@pytest.mark.parametrize("program", [LOOP, SLEEP, AWAIT], ids=["computes", "sleeps", "awaits"])
async def test_a_guest_ends_and_its_runner_takes_the_next(pool: RunnerPool, program: Program) -> None:
    pids = pool.stats()["pids"]
    await cancelled(await until_up(pool, program))
    await serves_as_before(pool, pids)


@pytest.mark.usefixtures("unhurried")
async def test_a_component_ends_too(pool: RunnerPool, module: Module) -> None:
    pids = pool.stats()["pids"]
    attempt = asyncio.create_task(pool.run(module("loop"), b"{}", LONG))
    while pool.stats()["busy"] == 0:
        await asyncio.sleep(0.005)
    await cancelled(attempt)
    await serves_as_before(pool, pids)


@pytest.mark.usefixtures("unhurried")
async def test_who_waits_for_the_host_ends_and_its_call_with_it(pool: RunnerPool) -> None:
    pids = pool.stats()["pids"]
    completer = Scripted(hangs=True)
    attempt = asyncio.create_task(pool.run(ASK_FOR_EVER, b"{}", LONG, granted=granted(completer)))
    await completer.begun.wait()
    await cancelled(attempt)
    assert completer.cancelled.is_set()
    assert len(completer.calls) == 1
    await serves_as_before(pool, pids)
    # Nothing of that call reaches the next guest.
    outcome = await pool.run(ASK, b"{}", limits(), granted=granted(Scripted("new")))
    assert json.loads(outcome.output or b"{}") == {"text": "new"}, outcome


@pytest.mark.usefixtures("unhurried")
async def test_a_call_that_does_not_let_go_holds_neither_guest_nor_runner(pool: RunnerPool) -> None:
    pids = pool.stats()["pids"]
    deaf, own, others = Deaf("late"), Deaf("own"), set(_leaving)
    attempt = asyncio.create_task(pool.run(ASK_FOR_EVER, b"{}", LONG, granted={"model": deaf}))
    await deaf.begun.wait()
    await cancelled(attempt)
    assert deaf.cancelled.is_set()
    await serves_as_before(pool, pids)
    # While the next guest waits for its own answer, the old one comes.
    (late,) = _leaving - others
    second = asyncio.create_task(pool.run(ASK, b"{}", LONG, granted={"model": own}))
    await own.begun.wait()
    deaf.lets_go.set()
    await asyncio.wait({late})
    own.lets_go.set()
    outcome = await second
    assert json.loads(outcome.output or b"{}") == {"text": "own"}, outcome
    await serves_as_before(pool, pids)


@pytest.mark.usefixtures("unhurried")
async def test_cancelled_again_while_it_ends(pool: RunnerPool) -> None:
    pids = pool.stats()["pids"]
    attempt = await until_up(pool, LOOP)
    attempt.cancel()
    await asyncio.sleep(0)
    await cancelled(attempt)
    async with asyncio.timeout(30):
        assert (await pool.run(ECHO, b"{}", limits())).status == "succeeded"
    await serves_as_before(pool, pids)


async def test_who_sleeps_in_the_engine_is_ended_with_its_runner(pool: RunnerPool, module: Module) -> None:
    (pid,) = pool.stats()["pids"]
    attempt = asyncio.create_task(pool.run(module("sleep_hour"), b"{}", limits()))
    while pool.stats()["busy"] == 0:
        await asyncio.sleep(0.005)
    # It may be stopped just before it sleeps; then its runner stays.
    await asyncio.sleep(1)
    await cancelled(attempt)
    assert pid not in pool.stats()["pids"]
    assert (await pool.run(ECHO, b"{}", limits())).status == "succeeded"
    assert pool.stats()["restarts"] == 1


async def test_a_runner_that_does_not_answer_is_ended(pool: RunnerPool) -> None:
    attempt = await until_up(pool, LOOP)
    (pid,) = pool.stats()["pids"]
    os.kill(pid, signal.SIGSTOP)
    await cancelled(attempt)
    assert pid not in pool.stats()["pids"]
    assert (await pool.run(ECHO, b"{}", limits())).status == "succeeded"
    assert pool.stats()["restarts"] == 1


@pytest.mark.usefixtures("unhurried")
async def test_a_runner_that_is_not_to_be_spared_is_ended(pool: RunnerPool) -> None:
    (pid,) = pool.stats()["pids"]
    attempt = asyncio.create_task(pool.run(LOOP, b"{}", LONG, spares_runner=lambda: False))
    while pool.stats()["busy"] == 0:
        await asyncio.sleep(0.005)
    await cancelled(attempt)
    assert pid not in pool.stats()["pids"]
    assert (await pool.run(ECHO, b"{}", limits())).status == "succeeded"


@pytest.mark.usefixtures("unhurried")
async def test_who_stands_still_is_ended_with_its_runner(pool: RunnerPool) -> None:
    attempt = await until_up(pool, LOOP)
    (pid,) = pool.stats()["pids"]
    pool.pause()
    await cancelled(attempt)
    assert pid not in pool.stats()["pids"]
    pool.resume()
    assert (await pool.run(ECHO, b"{}", limits())).status == "succeeded"


async def test_a_runner_whose_guest_ended_just_before_a_pause_takes_the_next_one(pool: RunnerPool) -> None:
    pids = pool.stats()["pids"]
    (runner,) = pool._runners
    transport = runner._channel._transport
    assert transport is not None
    attempt = asyncio.create_task(pool.run(ECHO, b"{}", limits()))
    while pool.stats()["busy"] == 0:
        await asyncio.sleep(0)
    # The guest ends, and this loop does not see it yet.
    assert select.select([transport.get_extra_info("socket").fileno()], [], [], 30)[0]
    pool.pause()
    assert (await attempt).status == "succeeded"
    pool.resume()
    assert (await pool.run(ECHO, b"{}", limits())).status == "succeeded"
    assert pool.stats()["pids"] == pids


async def test_a_stop_ends_its_own_run_only_also_when_it_comes_first(pool: RunnerPool) -> None:
    (runner,) = pool._runners
    first = await pool.run(ECHO, b"{}", limits())
    assert first.status == "succeeded"
    runner._stops.write(frames.stop(runner.runs))
    for number in range(20):
        assert (await pool.run(ECHO, b"%d" % number, limits())).output is None  # not a dict
        outcome = await pool.run(ECHO, b'{"n":%d}' % number, limits())
        assert outcome.output == b'{"n":%d}' % number, outcome
    runner._stops.write(frames.stop(runner.runs + 1))
    assert (await pool.run(LOOP, b"{}", limits())).code == "cancelled"
    fresh = python("def run(input):\n    return {'fresh': 1}")
    runner._stops.write(frames.stop(runner.runs + 1))
    assert (await pool.run(fresh, b"{}", limits())).code == "cancelled"
    # It was not compiled then.
    assert (await pool.run(fresh, b"{}", limits())).output == b'{"fresh":1}'
    assert pool.stats()["restarts"] == 0


@pytest.mark.usefixtures("unhurried", "patient")
async def test_many_cancels_at_any_moment_spoil_no_other_run(two: RunnerPool) -> None:
    pids = two.stats()["pids"]
    rng = random.Random(SEED)
    for number in range(80):
        # Sometimes with sources that the runner has to compile first.
        new = python(f"def run(input):\n    return {{'n': input['n'], 'new': {number}}}")
        losers = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            program = rng.choice((ECHO, ECHO, new, LOOP, SLEEP, ASK))
            completer = Scripted(hangs=rng.random() < 0.7)
            losers.append(asyncio.create_task(two.run(program, b'{"n":-1}', limits(), granted=granted(completer))))
        await asyncio.sleep(rng.choice((0, rng.random() * 0.002, rng.random() * 0.02)))
        for loser in losers:
            loser.cancel()
        await asyncio.gather(*losers, return_exceptions=True)
        outcomes = await asyncio.gather(
            two.run(ECHO, b'{"n":%d}' % number, limits()),
            two.run(new, b'{"n":%d}' % number, limits()),
            two.run(ASK, b"{}", limits(), granted=granted(Scripted(f"answer {number}"))),
        )
        assert [json.loads(outcome.output or b"null") for outcome in outcomes] == [
            {"n": number},
            {"n": number, "new": number},
            {"text": f"answer {number}"},
        ], (SEED, number, outcomes)
    assert (two.stats()["pids"], two.stats()["restarts"], two.stats()["busy"]) == (pids, 0, 0)


class Peer:
    """The other end of a channel, which says what it likes."""

    def __init__(self, end: socket.socket) -> None:
        self._end = end

    def say(self, *replies: frames.Reply) -> None:
        self._end.sendall(b"".join(frames.encode(reply) for reply in replies))

    async def hear(self) -> HostAnswer:
        loop = asyncio.get_running_loop()
        header = await loop.sock_recv(self._end, frames.HEADER_BYTES)
        body = await loop.sock_recv(self._end, int.from_bytes(header, "big"))
        return msgspec.msgpack.decode(body, type=HostAnswer)


DONE = frames.Done("", "", "", b"{}", False, 1, 1, 1)


async def test_what_a_runner_says_after_the_stop_has_no_effect() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    theirs.setblocking(False)
    channel = _Channel()
    await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=ours)
    peer = Peer(theirs)
    lines: list[LogLine] = []
    calls: list[HostCall] = []

    async def answer(call: HostCall) -> HostAnswer:
        calls.append(call)
        return HostAnswer("{}")

    asking = asyncio.create_task(channel.ask(None, MIB, lines.extend, answer))
    await asyncio.sleep(0)
    await cancelled(asking)
    peer.say(frames.Log([LogLine(1, "info", "x")]), HostCall("model", "chat", "{}"))
    assert (await peer.hear()).ends
    assert not await channel.ended(0)
    peer.say(DONE)
    assert await channel.ended(30)
    assert (lines, calls) == ([], [])

    # It serves the next one; one that asks for more than its end is ended.
    asking = asyncio.create_task(channel.ask(None, MIB, lines.extend, answer))
    await asyncio.sleep(0)
    await cancelled(asking)
    peer.say(HostCall("model", "chat", "{}"), HostCall("model", "chat", "{}"))
    assert not await channel.ended(30)
    assert "broke the protocol" in channel.why
    assert calls == []
    theirs.close()


async def test_the_end_that_comes_with_the_cancellation_is_not_waited_for_again() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    channel = _Channel()
    await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=ours)
    for order in ("reply first", "cancellation first"):
        asking = asyncio.create_task(channel.ask(None, MIB))
        await asyncio.sleep(0)
        if order == "reply first":
            channel.data_received(bytes(frames.encode(DONE)))
            asking.cancel()
        else:
            asking.cancel()
            channel.data_received(bytes(frames.encode(DONE)))
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert await channel.ended(0)
    theirs.close()


async def test_a_runner_that_ends_a_guest_which_waits_for_the_host_is_ended() -> None:
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    channel = _Channel()
    await asyncio.get_running_loop().create_unix_connection(lambda: channel, sock=ours)

    async def answer(call: HostCall) -> HostAnswer:
        await asyncio.Event().wait()
        raise AssertionError

    Peer(theirs).say(HostCall("model", "chat", "{}"), DONE)
    with pytest.raises(RunnerGone, match="broke the protocol"):
        await channel.ask(None, MIB, on_call=answer)
    theirs.close()
