"""A hundred streams of tokens while executor, back ends, router and NATS die: none of them lies.

Half of the streams come from a back end beside the gateway, half through NATS from one on a second machine. Each
token names its place in its answer. A stream ends with all of them and `[DONE]`, or with an error that says so; it
never ends in silence, and no token is missing before its end, doubled or out of order.
"""

import asyncio
import json
import os
import random
import shutil
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import pytest
from hive_common.testing.installation import Installation, wait_until
from hive_common.testing.scripted import Script, ScriptedModel, ScriptedProcess

from tests.chaos.storm.processes import Processes, kill

SEED = int(os.environ.get("HIVE_CHAOS_SEED", "20261125"))
ROUNDS = int(os.environ.get("HIVE_CHAOS_ROUNDS", "1"))
STREAMS = 100
TOKENS = 30
PACE_MS = 100
AMID = 10
"""Streams that have begun and not ended when a fault strikes, at least."""
SILENCE_S = 90.0
"""A stream that says nothing for so long hangs; back ends say something ten times a second."""
BACK_S = 120.0
NEAR, FAR = "near", "far"

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


@dataclass
class Stream:
    """What a client saw. `end` is `done`, `error`, `refused` (an HTTP error before the first byte), or a breach."""

    model: str
    began_at: float = field(default_factory=time.monotonic)
    tokens: list[int] = field(default_factory=list)
    end: str = ""

    @property
    def amid(self) -> bool:
        return bool(self.tokens) and not self.end

    @property
    def honest(self) -> bool:
        """Its tokens are the first ones in order, and all of them where it says that it is done."""
        in_order = self.tokens == list(range(len(self.tokens)))
        return in_order and self.end in ("done", "error", "refused") and (self.end != "done" or self.whole)

    @property
    def whole(self) -> bool:
        return len(self.tokens) == TOKENS


@dataclass
class Machines:
    """Two machines with a back end each."""

    installation: Installation
    device: Installation
    back_ends: dict[str, ScriptedProcess]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    folder = Path(tempfile.mkdtemp(prefix="hive-streams-"))
    installation, device = Installation(folder / "home"), Installation(folder / "device")
    back_ends = {
        name: ScriptedProcess(folder, Script(models=(ScriptedModel(name=name),), tokens=TOKENS, pace_ms=PACE_MS))
        for name in (NEAR, FAR)
    }
    try:
        for back_end in back_ends.values():
            back_end.start()
        installation.hive("init", "--free-ports", "--executors", "1")
        installation.hive("up", "--detach", "--model-url", back_ends[NEAR].url)
        token = installation.json("executor", "token")["token"]
        device.hive("executor", "join", token, "--free-ports", "--detach", "--model-url", back_ends[FAR].url)
        wait_until(lambda: {NEAR, FAR} <= models_of(installation), 60, "both models are listed")
        yield Machines(installation, device, back_ends)
    finally:
        device.hive("down", check=False)
        installation.hive("down", check=False)
        for back_end in back_ends.values():
            back_end.stop()
        shutil.rmtree(folder, ignore_errors=True)


def models_of(installation: Installation) -> set[str]:
    return {model["id"] for model in installation.get("/v1/models")["data"]}


class Clients:
    """Clients that ask for one stream after the other, and write down what came."""

    def __init__(self, installation: Installation) -> None:
        self._url = json.loads((installation.home / "hive.json").read_text())["endpoints"]["http"]
        self._key = (installation.home / "api-key").read_text().strip()
        self.streams: list[Stream] = []
        self.over = False

    async def run(self) -> None:
        """Go on until `over` is set; what has begun is heard to its end."""
        headers = {"authorization": f"Bearer {self._key}"}
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(self._url, headers=headers, timeout=timeout, connector=connector) as session,
            asyncio.TaskGroup() as group,
        ):
            for number in range(STREAMS):
                group.create_task(self._client(session, (NEAR, FAR)[number % 2]))

    async def _client(self, session: aiohttp.ClientSession, model: str) -> None:
        while not self.over:
            stream = Stream(model)
            self.streams.append(stream)
            stream.end = await self._hear(session, stream)
            if stream.end == "refused":
                await asyncio.sleep(0.3)

    async def _hear(self, session: aiohttp.ClientSession, stream: Stream) -> str:
        body = {"model": stream.model, "stream": True, "messages": [{"role": "user", "content": "count"}]}
        try:
            async with session.post("/v1/chat/completions", json=body) as answer:
                if answer.status >= 400:
                    refusal = json.loads(await answer.read())
                    return "refused" if refusal["error"]["message"] else f"status {answer.status} without a word"
                return await heard(answer.content, stream.tokens)
        except TimeoutError:
            return f"silent for {SILENCE_S:g} s"
        except (aiohttp.ClientError, ValueError) as error:
            return f"cut: {error!r}"

    def amid(self, models: tuple[str, ...]) -> list[Stream]:
        """Return the streams of these models that are under way."""
        return [stream for stream in self.streams if stream.model in models and stream.amid]

    def done_since(self, moment: float) -> set[str]:
        """Return the models of which a stream was begun and ended well since."""
        return {stream.model for stream in self.streams if stream.end == "done" and stream.began_at > moment}


async def heard(lines: aiohttp.StreamReader, tokens: list[int]) -> str:
    """Read a stream of events to its end, and say how it ended."""
    end = "without an end"
    async for line in lines:
        data = line.strip().removeprefix(b"data: ")
        if not line.startswith(b"data: "):
            continue
        if end == "done":
            return f"something after its end: {data!r}"
        if data == b"[DONE]":
            end = end if end == "error" else "done"
            continue
        event = json.loads(data)
        if "error" in event:
            end = "error"
        elif text := event["choices"][0]["delta"].get("content"):
            tokens += map(int, text.split())
    return end


@dataclass
class Fault:
    """`models`: whose streams it meets. `breaks`: some of them have to break. `mend` blocks."""

    models: tuple[str, ...]
    breaks: bool
    pid: Callable[[], int | None]
    mend: Callable[[], None] = lambda: None


def faults_of(machines: Machines) -> dict[str, Fault]:
    """Return what strikes."""
    here, there = Processes(machines.installation.home), Processes(machines.device.home)

    def back_end(name: str) -> Fault:
        served = machines.back_ends[name]

        def mend() -> None:
            served.stop()
            served.start()

        return Fault((name,), True, lambda: served.pid, mend)

    return {
        "executor": Fault((FAR,), True, lambda: there.pid(there.executors()[0])),
        "back end beside the gateway": back_end(NEAR),
        "back end of the second machine": back_end(FAR),
        "router": Fault((NEAR, FAR), True, lambda: here.pid("router")),
        # What was published while it was away may come after all: then nothing is missing.
        "nats": Fault((FAR,), False, lambda: here.pid("nats")),
    }


async def until(holds: Callable[[], bool], what: str) -> None:
    started = time.monotonic()
    while not holds():
        assert time.monotonic() < started + BACK_S, f"not within {BACK_S:g} s: {what}"
        await asyncio.sleep(0.05)


async def strike(clients: Clients, name: str, fault: Fault, pause_s: float) -> int:
    """Strike amid streams, wait for their ends and for whole streams afterwards; return how many it broke."""
    await until(lambda: len(clients.amid(fault.models)) >= AMID, f"streams are under way ({name})")
    await asyncio.sleep(pause_s)
    met, pid = clients.amid(fault.models), fault.pid()
    assert pid is not None and kill(pid), f"{name} was there"
    struck = time.monotonic()
    await asyncio.to_thread(fault.mend)
    await until(lambda: not any(stream.amid for stream in met), f"their ends ({name})")
    broken = sum(stream.end == "error" for stream in met)
    assert broken or not fault.breaks, f"{name}: {Counter(stream.end for stream in met)}"
    await until(lambda: clients.done_since(struck) == {NEAR, FAR}, f"whole streams after it ({name})")
    return broken


@pytest.mark.parametrize("seed", range(SEED, SEED + ROUNDS))
async def test_every_stream_ends_and_none_loses_doubles_or_reorders_a_token(machines: Machines, seed: int) -> None:
    rng = random.Random(seed)
    clients, faults = Clients(machines.installation), faults_of(machines)
    broken = {}
    running = asyncio.create_task(clients.run())
    try:
        for name in rng.sample(list(faults), len(faults)):
            broken[name] = await strike(clients, name, faults[name], rng.uniform(0, 0.5))
    finally:
        clients.over = True
        await running
    assert [stream for stream in clients.streams if not stream.honest] == []
    ends = Counter(stream.end for stream in clients.streams)
    tokens = sum(len(stream.tokens) for stream in clients.streams)
    print(json.dumps({"seed": seed, "streams": len(clients.streams), **ends, "tokens": tokens, "broken": broken}))
    assert (await asyncio.to_thread(machines.installation.verify))["ok"]
