"""Model calls through HiveFabric, beside those with nothing between, LiteLLM's proxy and Portkey's gateway.

`python -m benchmarks.models [--rounds N] [--quick]` prints JSON. All of it goes to one scripted back end, whose
answers take the same time for everybody. A round measures every system, one after the other; whoever is not
measured idles, the peers stand still. What is added is the difference to the same figure with nothing between, in
the same round. Client, back end and what is measured share the machine's cores.
"""

import argparse
import asyncio
import itertools
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import aiohttp
import uvloop
from hive_common.testing.installation import Installation, wait_until
from hive_common.testing.scripted import Script, ScriptedModel, ScriptedProcess

from benchmarks import model_peers, report
from benchmarks.cpu import CpuClock, per_task_ms
from benchmarks.model_client import Connection, Target
from benchmarks.rounds import spread, spreads
from benchmarks.stack import write_agents

ROUNDS = int(os.environ.get("HIVE_BENCH_MODEL_ROUNDS", "5"))
IN_FLIGHT: Final = (1, 4, 16)
TOKENS: Final = 16
ANSWER_MS: Final = 100.0
"""What the back end takes for a whole answer where latency is measured; a small model's is rarely faster."""
FIRST_TOKEN_MS: Final = 20.0
CALLERS: Final = 32
STREAMS: Final = 64
STREAM_TOKENS: Final = 60
STREAM_PACE_MS: Final = 50.0
LEFT_TOKENS: Final = 100
LEFT_PACE_MS: Final = 20.0
FAR: Final = "far"
HIVE, HIVE_FAR, DIRECT, LITELLM, PORTKEY = "hive", "hive_far", "direct", "litellm", "portkey"

Figures = dict[str, float]


class Sizes:
    """How much is measured."""

    def __init__(self, *, quick: bool) -> None:
        self.calls_each = 5 if quick else 15
        self.rate_calls = 200 if quick else 2_000
        self.first_tokens = 10 if quick else 50
        self.leaves = 3 if quick else 10


async def gathered(target: Target, callers: int, calls_each: int) -> list[float]:
    """Return the seconds of `calls_each` calls by each of `callers`, all of them at once."""

    async def caller() -> list[float]:
        connection = Connection(target)
        await connection.open()
        try:
            await connection.whole()
            return [await connection.whole() for _ in range(calls_each)]
        finally:
            await connection.close()

    return [seconds for one in await asyncio.gather(*(caller() for _ in range(callers))) for seconds in one]


async def rate(target: Target, calls: int) -> float:
    """Return calls per second of as many callers as there are connections, the back end answering at once."""
    left = iter(range(calls))
    connections = [Connection(target) for _ in range(CALLERS)]
    for connection in connections:
        await connection.open()
        await connection.whole()

    async def caller(connection: Connection) -> None:
        for _ in left:
            await connection.whole()

    began = time.perf_counter()
    await asyncio.gather(*map(caller, connections))
    seconds = time.perf_counter() - began
    for connection in connections:
        await connection.close()
    return calls / seconds


async def first_tokens(target: Target, calls: int) -> float:
    """Return the median milliseconds until the first token of a stream, one at a time."""
    connection = Connection(target)
    await connection.open()
    await connection.stream(TOKENS)
    found = [(await connection.stream(TOKENS))[0] for _ in range(calls)]
    await connection.close()
    return statistics.median(found) * 1e3


async def jitter(target: Target) -> float:
    """Return the p99 of how far the time between two tokens is from the pace, of many streams at once."""

    async def caller(number: int) -> list[float]:
        connection = Connection(target)
        await connection.open()
        # Spread over one pace: tokens of different users do not come at the same instant either.
        await asyncio.sleep(number / STREAMS * STREAM_PACE_MS / 1e3)
        times = await connection.stream(STREAM_TOKENS)
        await connection.close()
        return [abs((b - a) * 1e3 - STREAM_PACE_MS) for a, b in itertools.pairwise(times)]

    gaps = sorted(gap for one in await asyncio.gather(*map(caller, range(STREAMS))) for gap in one)
    return gaps[len(gaps) * 99 // 100]


async def cancelled_ms(target: Target, back_end: ScriptedProcess, leaves: int) -> float:
    """Return the longest milliseconds from a client's leaving to the end of the generation at the back end.

    Whoever does not cancel it lets it run to its own end, two seconds later.
    """
    longest = 0.0
    async with aiohttp.ClientSession(back_end.url) as client:
        for _ in range(leaves):
            connection = Connection(target)
            await connection.open()
            left_s = await connection.begin_and_leave()
            while True:
                async with client.get("/scripted/generations") as answer:
                    last = (await answer.json(content_type=None))[-1]
                if last["outcome"]:
                    break
                await asyncio.sleep(0.01)
            if last["outcome"] != "cancelled" and target.name.startswith(HIVE):
                raise RuntimeError(f"{target.name}: a generation ended as {last['outcome']}, not cancelled")
            # Both processes read the same monotonic clock.
            longest = max(longest, (last["ended_s"] - left_s) * 1e3)
    return longest


async def measure(target: Target, back_end: ScriptedProcess, sizes: Sizes) -> Figures:
    """Measure one system once."""
    found: Figures = {}
    steady = {"tokens": TOKENS, "first_token_ms": FIRST_TOKEN_MS}
    back_end.play(**steady, pace_ms=(ANSWER_MS - FIRST_TOKEN_MS) / TOKENS)
    for callers in IN_FLIGHT:
        times = await gathered(target, callers, sizes.calls_each * (4 if callers == 1 else 1))
        found[f"p50_ms_{callers}"] = statistics.median(times) * 1e3
    back_end.play(**steady, pace_ms=5)
    found["first_token_ms"] = await first_tokens(target, sizes.first_tokens)
    back_end.play(tokens=TOKENS, first_token_ms=0, pace_ms=0)
    found["calls_per_s"] = await rate(target, sizes.rate_calls)
    back_end.play(tokens=STREAM_TOKENS, first_token_ms=FIRST_TOKEN_MS, pace_ms=STREAM_PACE_MS)
    found["jitter_p99_ms"] = await jitter(target)
    back_end.play(tokens=LEFT_TOKENS, first_token_ms=0, pace_ms=LEFT_PACE_MS)
    found["cancelled_ms"] = await cancelled_ms(target, back_end, sizes.leaves)
    return found


def added(one: Mapping[str, Figures], system: str) -> Figures:
    """Return what a system adds to the figures without anything between, within one round."""
    names = [name for name in one[system] if name.startswith("p50_ms") or name == "first_token_ms"]
    return {name: one[system][name] - one[DIRECT][name] for name in names}


class Stack:
    """An installation, and a second home on the same machine that has joined it and has a model of its own."""

    def __init__(self, folder: Path, near: str, far: str) -> None:
        """Args: `far` is the back end of the second home, empty without one."""
        self._near, self._far = near, far
        self.installation = Installation(folder / "home")
        self.device = Installation(folder / "device")
        self.joined_s = 0.0
        self._folder = folder

    def start(self) -> None:
        """Start both, and run a task on the new machine, which is timed from the token on."""
        hive = self.installation.hive
        hive("init", "--free-ports", "--executors", "1")
        hive("up", "--detach", "--model-url", self._near)
        expected = {"scripted"}
        if self._far:
            self.joined_s = self._join()
            expected.add(FAR)
        wait_until(lambda: self._models() >= expected, 60, f"{expected} are listed")

    def _join(self) -> float:
        self.installation.hive("agent", "push", str(write_agents(self._folder)["command"]))
        token = self.installation.json("executor", "token")["token"]
        self.installation.hive("executor", "drain", "executor-1")
        began = time.perf_counter()
        join = ("executor", "join", token, "--name", "device", "--model-url", self._far, "--free-ports", "--detach")
        self.device.hive(*join)
        job = {
            "apiVersion": "hive/v1",
            "kind": "Job",
            "name": "first",
            "tasks": [{"id": "first", "agent": "noop-command@1.0.0", "input": {}}],
        }
        job_id = self.installation.submit(job)
        wait_until(
            lambda: self.installation.get(f"/v1/jobs/{job_id}")["state"] == "succeeded",
            60,
            "the first task is done",
        )
        seconds = time.perf_counter() - began
        self.installation.hive("executor", "undrain", "executor-1")
        return seconds

    def _models(self) -> set[str]:
        return {model["id"] for model in self.installation.get("/v1/models")["data"]}

    def target(self, name: str, model: str) -> Target:
        """Return the gateway as a target."""
        port = int(self.installation.json("status")["endpoints"]["http"].rsplit(":", 1)[1])
        key = (self.installation.home / "api-key").read_text().strip()
        return Target(name, port, model, {"Authorization": f"Bearer {key}"})

    def stop(self) -> None:
        """Stop both."""
        self.device.hive("down", check=False)
        self.installation.hive("down", check=False)


async def one_round(
    targets: Mapping[str, tuple[Target, ScriptedProcess]], peers: Mapping[str, model_peers.Proxy], sizes: Sizes
) -> dict[str, Figures]:
    """Measure every system once."""
    found: dict[str, Figures] = {}
    for name, (target, back_end) in targets.items():
        print(f"bench: models: {name}", file=sys.stderr, flush=True)
        if name in peers:
            peers[name].wake()
        try:
            found[name] = await measure(target, back_end, sizes)
        finally:
            if name in peers:
                peers[name].sleep()
    found |= {f"added_{name}": added(found, name) for name in targets if name != DIRECT}
    found["load"] = {"average_1min": os.getloadavg()[0]}
    return found


def compared(rounds: list[dict[str, Figures]], peer: str) -> dict[str, dict[str, float]]:
    """Return how many times less than a peer HiveFabric adds, and how many times more calls it takes, by round."""
    names = list(rounds[0][f"added_{peer}"])
    found = {
        f"less_{name}": spread(one[f"added_{peer}"][name] / max(0.01, one[f"added_{HIVE}"][name]) for one in rounds)
        for name in names
    }
    found["calls_per_s"] = spread(one[HIVE]["calls_per_s"] / one[peer]["calls_per_s"] for one in rounds)
    return found


async def run(rounds: int = ROUNDS, *, quick: bool = False, alone: bool = False) -> dict[str, Any]:
    """Start everything, measure, stop everything."""
    folder = Path(tempfile.mkdtemp(prefix="hive-bench-models-"))
    sizes = Sizes(quick=quick)
    script = Script(tokens=TOKENS)
    far_script = Script(tokens=TOKENS, models=(ScriptedModel(name=FAR),))
    with ExitStack() as started:
        started.callback(shutil.rmtree, folder, ignore_errors=True)
        near, far = ScriptedProcess(folder, script), ScriptedProcess(folder, far_script)
        stack = Stack(folder, near.url, "" if alone else far.url)
        for one in (near, far, stack):
            started.callback(one.stop)
            one.start()
        targets = {
            DIRECT: (Target(DIRECT, near.port, "scripted"), near),
            HIVE: (stack.target(HIVE, "scripted"), near),
        }
        if not alone:
            targets[HIVE_FAR] = (stack.target(HIVE_FAR, FAR), far)
        peers: dict[str, model_peers.Proxy] = {}
        if model_peers.installed():
            peers = {LITELLM: model_peers.litellm(near.url, folder), PORTKEY: model_peers.portkey(near.url, folder)}
        for name, peer in peers.items():
            print(f"bench: models: starting {name}", file=sys.stderr, flush=True)
            peer.start()
            started.callback(peer.stop)
            peer.sleep()
            targets[name] = (peer.target, near)
        found = [await one_round(targets, peers, sizes) for _ in range(rounds)]
        result: dict[str, Any] = {"rounds": rounds, "joined_to_first_task_s": round(stack.joined_s, 1)}
        result |= {name: spreads([one[name] for one in found]) for name in found[0]}
        result |= {f"hive_to_{name}": compared(found, name) for name in peers}
        result["versions"] = model_peers.versions() if peers else {}
        result["cpu_ms_per_call"] = await cpu(stack, targets[HIVE][0], near, sizes)
    return result


async def run_alone(given: argparse.Namespace) -> dict[str, Any]:
    """Run the benchmark, and say when and of what."""
    from benchmarks.__main__ import about  # which imports this module

    described = {key: value for key, value in about().items() if key not in ("peers", "versions")}
    result = await run(given.rounds, quick=given.quick, alone=given.alone)
    described["load_average_after"] = [round(load, 1) for load in os.getloadavg()]
    return {"about": described, **result}


async def cpu(stack: Stack, target: Target, back_end: ScriptedProcess, sizes: Sizes) -> Figures:
    """Return milliseconds of CPU of each process for one call, which is what bounds the calls per second."""
    back_end.play(tokens=TOKENS, first_token_ms=0, pace_ms=0)
    clock = CpuClock(stack.installation)
    before = clock.read()
    await rate(target, sizes.rate_calls)
    return {name: round(ms, 3) for name, ms in per_task_ms(before, clock.read(), sizes.rate_calls).items()}


def main() -> None:
    """Measure, print, and unless it was quick keep the results and write the table of the documentation."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="a tenth of it: to see that it works")
    parser.add_argument("--alone", action="store_true", help="without a second machine")
    given = parser.parse_args()
    if not model_peers.installed():
        print("bench: the peers are not installed, their figures stay empty: make bench-peers", file=sys.stderr)
    result = uvloop.run(run_alone(given))
    print(json.dumps(result, indent=2))
    if given.quick or given.alone or os.environ.get("HIVE_BENCH_KEEP", "1") == "0":
        return
    print(f"bench: written to {report.keep('models', result)} and {report.DOCUMENT}", file=sys.stderr)


if __name__ == "__main__":
    main()
