"""Fork-join: graphs of model calls beside LangGraph and DBOS, a wide fork, and executors that share one.

`python -m benchmarks.forkjoin [--rounds N] [--quick]` prints JSON. The same client waits for everything, from
the submit (or the start of a peer's workflow) to the result. What is called the bound is the sum of scripted
latencies along the longest way through a graph.
"""

import os
import sys
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import aiohttp
import wasmtime
from hive_common.testing.scripted import Script, ScriptedProcess

from benchmarks import peer_runs
from benchmarks.fleet import Fleet, fleet, shown
from benchmarks.graphs import (
    KINDS,
    PACE_MS,
    Graph,
    calls,
    critical_tokens,
    graph_of,
    job,
    needs,
    plain,
    sequence,
)
from benchmarks.part import run_part
from benchmarks.rounds import spread, spreads
from benchmarks.stack import submit_and_wait

ROUNDS = int(os.environ.get("HIVE_BENCH_FORKJOIN_ROUNDS", "3"))
PEERS: Final = (
    "langgraph_postgres_sync",
    "langgraph_postgres_async",
    "langgraph_sqlite_sync",
    "dbos_steps",
    "dbos_queue",
)
WIDTH: Final = 8
GRAINS_MS: Final = (50, 100, 200, 500)
"""Lengths of every task of a plan, eight at once, and an answer."""
WIDE: Final = 1_000
DEVICES: Final = (1, 2, 4, 8)
SLOTS: Final = 4
GRAPH_DEVICES: Final = 2
"""For graphs and plans: as many slots as the widest has calls at once. The cores here are two, however many
processes share them, and each that wakes for one task of eight takes its part."""
WAIT_MS: Final = 250
WAITS: Final = 320
"""Ten waits for each slot that eight executors have."""

CALLER = """\
from hive import model


def run(input: dict) -> dict:
    prompt = str(len(input["given"]))
    return {"text": model.chat(prompt, max_tokens=input["tokens"]).text, "items": input.get("items", [])}
"""
CALLER_MAY: Final = {"model": {"names": ["scripted"], "max_tokens": 1000, "pin": "pool"}}
WAITER = """\
import time


def run(input: dict) -> dict:
    time.sleep(input["tokens"] / 1000)
    return {"text": "", "items": input.get("items", [])}
"""
COMMAND = """\
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "poll_oneoff" (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 16) "{}")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 16))
    (i32.store (i32.const 4) (i32.const 2))
    (i32.store (i32.const 80) (i32.const 1))
    (i64.store (i32.const 88) (i64.const %d))
    (drop (call $poll (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 192)))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))
"""
"""Waits so many nanoseconds on the monotonic clock."""
COUNTER = """\
def run(input: dict) -> dict:
    return {"results": len(input["results"])}
"""

Figures = dict[str, float]


class Sizes:
    """How much is measured."""

    def __init__(self, *, quick: bool) -> None:
        self.seeds = 1 if quick else 2
        self.grains = 1 if quick else 10
        self.lengths_ms = GRAINS_MS[:2] if quick else GRAINS_MS
        self.wide = 100 if quick else WIDE
        self.waits = 64 if quick else WAITS


class Agents:
    """The agents of this benchmark, published."""

    def __init__(self, of: Fleet) -> None:
        self.caller = of.push("caller", CALLER, CALLER_MAY)
        self.waiter = of.push("waiter", WAITER)
        self.counter = of.push("counter", COUNTER)
        self.commands = {
            ms: of.push_command(f"wait-{ms}", bytes(wasmtime.wat2wasm(COMMAND % (ms * 1_000_000))))
            for ms in GRAINS_MS
        }


async def timed(client: aiohttp.ClientSession, document: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Run a job; return what the gateway shows of it, and the milliseconds that it took."""
    job_id, seconds = await submit_and_wait(client, document)
    return await shown(client, job_id), seconds * 1e3


def graphs_of(first: int, count: int) -> list[tuple[str, Graph]]:
    """Return graphs of every kind, of so many seeds from `first` on."""
    return [(kind, graph_of(kind, seed)) for kind in KINDS for seed in range(first, first + count)]


def compared(made: list[tuple[str, Graph]], walls: list[float], one_by_one: list[float]) -> Figures:
    """Return for each kind how many times faster it is than one by one, and its share of the bound, in one round.

    Args:
        walls, one_by_one: milliseconds of each graph, and of its sequence.
    """
    found: Figures = {}
    for kind in KINDS:
        at = [place for place, (one, _) in enumerate(made) if one == kind]
        wall = sum(walls[place] for place in at)
        bound = sum(critical_tokens(made[place][1]) * PACE_MS for place in at)
        found[f"{kind}_ms"] = wall / len(at)
        found[f"{kind}_speed_up"] = sum(one_by_one[place] for place in at) / wall
        found[f"{kind}_of_bound"] = bound / wall
    return found


def possible(made: list[tuple[str, Graph]]) -> Figures:
    """Return the same for a system that costs nothing."""
    bounds = [float(critical_tokens(graph) * PACE_MS) for _, graph in made]
    sums = [float(critical_tokens(sequence(graph)) * PACE_MS) for _, graph in made]
    return compared(made, bounds, sums)


async def ours(client: aiohttp.ClientSession, agents: Agents, made: list[tuple[str, Graph]]) -> Figures:
    """Run every graph and its sequence on HiveFabric."""
    walls: list[float] = []
    one_by_one: list[float] = []
    for kind, graph in made:
        for document, times in (
            (job(graph, agents.caller, forked=kind != "dependent"), walls),
            (job(sequence(graph), agents.caller, forked=False), one_by_one),
        ):
            found, ms = await timed(client, document)
            tokens = calls(graph)[-1].tokens
            if len(str(found["output"]).split()) != tokens:
                raise RuntimeError(f"the last call has {tokens} tokens, the output is {found['output']!r}")
            times.append(ms)
    return compared(made, walls, one_by_one)


async def peer(servers: peer_runs.PeerServers, system: str, made: list[tuple[str, Graph]], url: str) -> Figures:
    """Run every graph and its sequence on a peer."""
    graphs = [*(graph for _, graph in made), *(sequence(graph) for _, graph in made)]
    given = [
        {"tree": plain(graph), "needs": needs(graph), "calls": [[one.name, one.tokens] for one in calls(graph)]}
        for graph in graphs
    ]
    times = await servers.graphs(system, given, url)
    return compared(made, times[: len(made)], times[len(made) :])


def waits(agent: str, ms: int, *, one_by_one: bool) -> dict[str, Any]:
    """Return a job of a wait, eight at once, and a wait; or of all of them one by one."""
    step = {"agent": agent, "input": {"tokens": ms}}
    middle = [f"wait_{number}" for number in range(WIDTH)]
    if one_by_one:
        names = ["plan", *middle, "answer"]
        tasks = [{"id": name, **step, "needs": names[at - 1 : at] if at else []} for at, name in enumerate(names)]
    else:
        tasks = [
            {"id": "plan", **step},
            {"id": "wait", **step, "needs": ["plan"], "fork": "${input}"},
            {"id": "answer", **step, "needs": ["wait"]},
        ]
    return {"apiVersion": "hive/v1", "kind": "Job", "name": "waits", "input": middle, "tasks": tasks}


async def grains(client: aiohttp.ClientSession, agents: Mapping[int, str], times: int) -> Figures:
    """Return what fork-join of tasks of one length which only wait comes to.

    `of_bound` is the critical path's share of the time. `of_speed_up` is the speed-up over the same tasks one by
    one, as a share of the speed-up that is possible: there the sequence pays for its tasks, too.
    """
    found: Figures = {}
    for ms, agent in agents.items():
        walls = {}
        for one_by_one, runs in ((False, times), (True, max(1, times // 5))):
            document = waits(agent, ms, one_by_one=one_by_one)
            await timed(client, document)
            walls[one_by_one] = sum([(await timed(client, document))[1] for _ in range(runs)]) / runs
        forked, sequential = walls[False], walls[True]
        found[f"of_bound_{ms}"] = 3 * ms / forked
        found[f"of_speed_up_{ms}"] = sequential / forked / ((WIDTH + 2) / 3)
        found[f"added_ms_{ms}"] = forked - 3 * ms
    return found


def wide_job(agents: Agents, tasks: int, ms: int) -> dict[str, Any]:
    """Return a job that forks so many waits, and one task that is given all of their results."""
    wait = {"id": "wait", "agent": agents.waiter, "fork": "${input}", "input": {"tokens": ms}}
    count = {"id": "count", "agent": agents.counter, "needs": ["wait"]}
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "wide",
        "input": list(range(tasks)),
        "limits": {"deadline": "10m", "fan_out": tasks + 1},
        "tasks": [wait, {**count, "input": {"results": "${tasks.wait.output}"}}],
        "output": "${tasks.count.output.results}",
    }


async def wide(client: aiohttp.ClientSession, agents: Agents, tasks: int, ms: int, slots: int) -> Figures:
    """Return the seconds of a fork that is joined, and what of them is not waiting in slots."""
    found, wall_ms = await timed(client, wide_job(agents, tasks, ms))
    if found["output"] != tasks:
        raise RuntimeError(f"{tasks} tasks were joined as {found['output']}")
    ideal_s = -(-tasks // slots) * ms / 1e3
    return {"wall_s": wall_ms / 1e3, "overhead_s": wall_ms / 1e3 - ideal_s}


async def scaled(of: Fleet, client: aiohttp.ClientSession, agents: Agents, tasks: int) -> Figures:
    """Return how much faster more executors are than one, as a share of how many more there are."""
    found: Figures = {}
    for devices in DEVICES:
        of.use(devices)
        # A wait in each slot first: executors that stood idle for a minute have lost pages to the machine.
        await wide(client, agents, devices * SLOTS, WAIT_MS, devices * SLOTS)
        found[f"wall_s_{devices}"] = (await wide(client, agents, tasks, WAIT_MS, devices * SLOTS))["wall_s"]
    return found | {
        f"efficiency_{devices}": found["wall_s_1"] / found[f"wall_s_{devices}"] / devices for devices in DEVICES
    }


async def one_round(
    of: Fleet,
    client: aiohttp.ClientSession,
    agents: Agents,
    servers: peer_runs.PeerServers | None,
    model: ScriptedProcess,
    number: int,
    sizes: Sizes,
) -> dict[str, Mapping[str, float]]:
    """Measure everything once."""
    made = graphs_of(number * sizes.seeds, sizes.seeds)
    of.use(GRAPH_DEVICES)
    found: dict[str, Mapping[str, float]] = {"possible": possible(made)}
    progress(f"round {number + 1}: graphs")
    found["hive"] = await ours(client, agents, made)
    for system in PEERS if servers else ():
        assert servers is not None
        progress(f"round {number + 1}: {system}")
        found[system] = await peer(servers, system, made, model.url)
    progress(f"round {number + 1}: grains, a wide fork, scaling")
    python = dict.fromkeys(sizes.lengths_ms, agents.waiter)
    command = {ms: agents.commands[ms] for ms in sizes.lengths_ms}
    found["grains"] = await grains(client, python, sizes.grains)
    found["grains_command"] = await grains(client, command, sizes.grains)
    of.use(DEVICES[-1])
    slots = DEVICES[-1] * SLOTS
    found["wide"] = await wide(client, agents, sizes.wide, 0, slots)
    found["wide_waiting"] = await wide(client, agents, sizes.wide, WAIT_MS, slots)
    found["scaled"] = await scaled(of, client, agents, sizes.waits)
    found["load"] = {"average_1min": os.getloadavg()[0]}
    return found


async def run(rounds: int = ROUNDS, *, quick: bool = False) -> dict[str, Any]:
    """Start everything, measure, stop everything."""
    sizes = Sizes(quick=quick)
    with ExitStack() as started:
        folder = Path(started.enter_context(tempfile.TemporaryDirectory(prefix="hive-bench-")))
        script = Script(tokens=1_000, first_token_ms=PACE_MS, pace_ms=PACE_MS)
        model = started.enter_context(ScriptedProcess(folder, script))
        servers = peer_runs.PeerServers(folder / "peers") if peer_runs.interpreter() else None
        async with fleet(DEVICES[-1], SLOTS, model.url) as made:
            agents = Agents(made)
            async with made.client() as client:
                made.use(GRAPH_DEVICES)
                await ours(client, agents, graphs_of(10_000, 1))
                found = [
                    await one_round(made, client, agents, servers, model, number, sizes) for number in range(rounds)
                ]
            log = made.installation.verify()
    result: dict[str, Any] = {"rounds": rounds, "devices": DEVICES[-1], "slots": SLOTS, "wide_tasks": sizes.wide}
    result |= {name: spreads([one[name] for one in found]) for name in found[0]}
    result["least_efficiency"] = spread(
        min(one["scaled"][f"efficiency_{devices}"] for devices in DEVICES) for one in found
    )
    return result | {"log": {"ok": log["ok"]}}


def progress(text: str) -> None:
    """Say what is being measured."""
    print(f"bench: fork-join: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print, and unless it was quick keep the results and write the tables of the documentation."""
    run_part("forkjoin", __doc__, run)


if __name__ == "__main__":
    main()
