"""Judged tasks on a real installation: coverage by samples, what a loser costs after the decision, and hedging.

`python -m benchmarks.speculation [--rounds N] [--quick]` prints JSON. Executors have more slots than there are
tasks under way where times are measured: what is judged is what a task takes, not how long it waits for a slot.
"""

import asyncio
import json
import math
import os
import random
import statistics
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import aiohttp
import psycopg
from hive_common.testing.scripted import Script, ScriptedProcess

from benchmarks.fleet import Fleet, fleet
from benchmarks.graphs import PACE_MS
from benchmarks.part import run_part
from benchmarks.rounds import Spread, spread, spreads
from benchmarks.stack import submit_and_wait

ROUNDS = int(os.environ.get("HIVE_BENCH_SPECULATION_ROUNDS", "3"))
DEVICES: Final = 2
SLOTS: Final = 36
RIGHT: Final = 0.5
"""Of the noisy agent's answers are right."""
SAMPLES: Final = {1: 1_500, 2: 1_200, 4: 600, 8: 300}
"""Tasks for each k: the fewer samples, the more the share of solved tasks varies."""
RACES: Final = 30
BASE_MS: Final = 100
SLOW: Final = 10
HEDGED: Final = 1_500
CALLERS: Final = 8
"""Few: what is judged is what a task takes, not how busy two cores are."""
HEDGES: Final = {
    "5": (0.05, [("one", 2, "150ms"), ("two", 3, "150ms")]),
    "2": (0.02, [("p95", 2, "p95"), ("one", 2, "150ms")]),
}
"""By the percentage of stragglers: their share, and the ways of hedging: name, replicas, `hedge_after`."""

PARTS: Final = 20
"""Of which a task that says how far it is does one after the other."""
PARTED_MS: Final = 2_000
PARTED: Final = 1_000
PARTED_CALLERS: Final = 64
BY_PROGRESS: Final = {"replicas": 3, "hedge_after": {"progress": 0.05, "within": "170ms"}}
"""A part takes 100 ms. Two hedges come after 340 ms; eight times less leaves 500 beside a task's own time."""

NOISY = f"""\
import random


def run(input: dict) -> dict:
    right = input["a"] * input["b"] + input["c"]
    return {{"value": right if random.random() < {RIGHT} else right + random.choice((-10, -1, 1, 10))}}
"""
CHECKER = """\
def run(input: dict) -> dict:
    asked = input["input"]
    return {"passed": input["output"]["value"] == asked["a"] * asked["b"] + asked["c"]}
"""
RACER = """\
import random
from hive import model


def run(input: dict) -> dict:
    return {"text": model.chat("race", max_tokens=random.randint(10, 200)).text}
"""
RACER_MAY: Final = {"model": {"names": ["scripted"], "max_tokens": 1000, "pin": "pool"}}
STRAGGLER = """\
import random
import time


def run(input: dict) -> dict:
    slow = random.random() < input["slow"]
    time.sleep(input["ms"] * (input["times"] if slow else 1) / 1000)
    return {"slow": slow}
"""

PARTED_STRAGGLER = """\
import random
import time
from hive import progress


def run(input: dict) -> dict:
    slow = random.random() < input["slow"]
    for part in range(1, input["parts"] + 1):
        time.sleep(input["ms"] * (input["times"] if slow else 1) / input["parts"] / 1000)
        if part == 1:
            progress(part / input["parts"])
    return {"slow": slow}
"""

Figures = dict[str, float]


class Sizes:
    """How much is measured."""

    def __init__(self, *, quick: bool) -> None:
        self.samples = {k: tasks // 10 for k, tasks in SAMPLES.items()} if quick else SAMPLES
        self.races = 3 if quick else RACES
        self.hedged = 200 if quick else HEDGED
        self.parted = 64 if quick else PARTED


class Agents:
    """The agents of this benchmark, published."""

    def __init__(self, of: Fleet) -> None:
        self.noisy = of.push("noisy", NOISY)
        self.checker = of.push("checker", CHECKER)
        self.racer = of.push("racer", RACER, RACER_MAY)
        self.stragglers = {name: of.push(f"straggler-{name}", STRAGGLER) for name in HEDGES}
        self.parted = of.push("straggler-parted", PARTED_STRAGGLER)


def document(name: str, step: dict[str, Any], tasks: list[Any]) -> dict[str, Any]:
    """Return a job that forks one step over `tasks`."""
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": name,
        "input": tasks,
        "limits": {"deadline": "10m", "fan_out": len(tasks)},
        "models": {"pin": "pool"},
        "tasks": [{"id": "solve", "fork": "${input}", "input": "${item}", **step}],
    }


def arithmetic(tasks: int, seed: int) -> list[dict[str, int]]:
    """Return so many generated tasks: a product and a sum."""
    rng = random.Random(seed)
    return [{name: rng.randint(2, 999) for name in "abc"} for _ in range(tasks)]


async def solved(of: Fleet, client: aiohttp.ClientSession, agents: Agents, k: int, tasks: int, seed: int) -> float:
    """Return the share of the generated tasks to which a verifier passed an answer, of k samples of each."""
    step = {
        "agent": agents.noisy,
        "speculate": {"replicas": k, "distinct": "none"},
        "verify": {"test": {"agent": agents.checker}},
        "on_failure": "skip",
    }
    job_id, _ = await submit_and_wait(client, document(f"coverage-{k}", step, arithmetic(tasks, seed)))
    events = of.installation.events(job_id)
    decided = {event["stream"] for event in events if event["type"] == "TaskDecided"}
    if len(decided) != tasks:
        raise RuntimeError(f"{len(decided)} of {tasks} tasks were decided over")
    return sum(event["type"] == "TaskSucceeded" and event["stream"] in decided for event in events) / tasks


async def coverage(of: Fleet, client: aiohttp.ClientSession, agents: Agents, sizes: Sizes, seed: int) -> Figures:
    """Return coverage@k for each k."""
    return {f"at_{k}": await solved(of, client, agents, k, tasks, seed) for k, tasks in sizes.samples.items()}


def generations(model: ScriptedProcess) -> list[dict[str, Any]]:
    """Return what the back end has generated, or begun to."""
    with urllib.request.urlopen(f"{model.url}/scripted/generations", timeout=10) as answer:
        found: list[dict[str, Any]] = json.load(answer)
        return found


async def races(
    of: Fleet, client: aiohttp.ClientSession, agents: Agents, model: ScriptedProcess, times: int
) -> Figures:
    """Return the milliseconds from decisions to the end of what the losers had the model do.

    Two replicas call the model, the first answer wins. What is timed is all of the way: the decision is committed,
    the loser's executor told, its guest ended, and its model call cancelled, until the back end generates no more.
    """
    found = []
    race = document("race", {"agent": agents.racer, "speculate": {"replicas": 2, "distinct": "none"}}, [{}])
    for _ in range(times):
        before = len(generations(model))
        job_id, _ = await submit_and_wait(client, race)
        (decided,) = (event for event in of.installation.events(job_id) if event["type"] == "TaskDecided")
        both = generations(model)[before:]
        lost = [one["ended_s"] for one in both if one["outcome"] == "cancelled"]
        if len(both) == 2 and len(lost) == 1:
            # The back end reads the monotonic clock of this machine, the log its wall clock.
            decided_s = decided["ts_us"] / 1e6 - time.time() + time.monotonic()
            found.append((lost[0] - decided_s) * 1e3)
    if len(found) < times / 2:
        raise RuntimeError(f"of {times} races {len(found)} had a loser that was cancelled")
    found.sort()
    figures = {"p50_ms": rank(found, 0.5), "p99_ms": rank(found, 0.99), "max_ms": found[-1]}
    return figures | {"counted": len(found)}


def rank(ordered: list[float], share: float) -> float:
    """Return a percentile by nearest rank."""
    return ordered[max(0, math.ceil(share * len(ordered) - 1e-9) - 1)]


def tail(ordered: list[float], attempts: int) -> Figures:
    """Return percentiles by nearest rank, and extra attempts as a share of tasks; `ordered` ascends."""
    ranks = {"p50_ms": 0.5, "p90_ms": 0.9, "p99_ms": 0.99, "p999_ms": 0.999}
    found = {name: rank(ordered, share) for name, share in ranks.items()}
    return found | {"extra_percent": (attempts - len(ordered)) / len(ordered) * 100}


async def straggling(
    client: aiohttp.ClientSession,
    dsn: str,
    agent: str,
    given: dict[str, Any],
    hedge: dict[str, Any] | None,
    tasks: int,
    callers: int = CALLERS,
) -> Figures:
    """Return the percentiles of tasks of which some are slow, with or without hedges.

    Each is a job of its own, submitted by one of `callers` that wait for its result; there are more slots than
    attempts, since a hedge cannot help where it waits for a slot.
    """
    step: dict[str, Any] = {"agent": agent, "timeout": "60s"}
    if hedge is not None:
        step["speculate"] = {**hedge, "distinct": "none"}
    one = document("straggler", step, [{"times": SLOW, **given}])
    left = iter(range(tasks))
    found: list[float] = []

    async def caller(number: int) -> None:
        # Evenly over the time of a task: guests that all start at once would all be late.
        await asyncio.sleep(number / callers * given["ms"] / 1000)
        for _ in left:
            _, seconds = await submit_and_wait(client, one)
            found.append(seconds * 1e3)

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        before = await counted(connection)
        await asyncio.gather(*(caller(number) for number in range(callers)))
        after = await counted(connection)
    if after["TaskSucceeded"] - before["TaskSucceeded"] != tasks:
        raise RuntimeError(f"of {tasks} tasks not all succeeded: before {before}, after {after}")
    return tail(sorted(found), after["TaskAssigned"] - before["TaskAssigned"])


async def counted(connection: psycopg.AsyncConnection[Any]) -> Counter[str]:
    """Return how many attempts were assigned so far, and how many tasks have succeeded."""
    found = await connection.execute(
        b"SELECT type, count(*) FROM log.events WHERE type IN ('TaskAssigned', 'TaskSucceeded') GROUP BY type"
    )
    return Counter(dict(await found.fetchall()))


async def one_round(
    of: Fleet, client: aiohttp.ClientSession, agents: Agents, model: ScriptedProcess, number: int, sizes: Sizes
) -> dict[str, Mapping[str, float]]:
    """Measure everything once."""
    dsn = of.installation.admin_dsn()
    progress(f"round {number + 1}: coverage")
    found: dict[str, Mapping[str, float]] = {"coverage": await coverage(of, client, agents, sizes, number)}
    progress(f"round {number + 1}: losers")
    found["losers"] = await races(of, client, agents, model, sizes.races)
    for percent, (slow, ways) in HEDGES.items():
        progress(f"round {number + 1}: {percent} % stragglers")
        agent, given = agents.stragglers[percent], {"slow": slow, "ms": BASE_MS}
        found[f"stragglers_{percent}"] = await straggling(client, dsn, agent, given, None, sizes.hedged)
        for name, replicas, after in ways:
            hedge = {"replicas": replicas, "hedge_after": after}
            found[f"stragglers_{percent}_{name}"] = await straggling(client, dsn, agent, given, hedge, sizes.hedged)
    progress(f"round {number + 1}: 5 % stragglers that say how far they are")
    given = {"slow": HEDGES["5"][0], "ms": PARTED_MS, "parts": PARTS}
    for name, by in (("parted_5", None), ("parted_5_progress", BY_PROGRESS)):
        found[name] = await straggling(client, dsn, agents.parted, given, by, sizes.parted, PARTED_CALLERS)
    found["load"] = {"average_1min": os.getloadavg()[0]}
    return found


def cuts(rounds: list[dict[str, Mapping[str, float]]]) -> dict[str, Spread]:
    """Return for each way of hedging how many times it cuts p99 and p99.9, within each round."""
    plain = {
        f"stragglers_{percent}_{name}": f"stragglers_{percent}"
        for percent, (_, ways) in HEDGES.items()
        for name, *_ in ways
    } | {"parted_5_progress": "parted_5"}
    return {
        f"{hedged}_{rank}_cut": spread(one[beside][f"{rank}_ms"] / one[hedged][f"{rank}_ms"] for one in rounds)
        for hedged, beside in plain.items()
        for rank in ("p99", "p999")
    }


def pooled(rounds: list[dict[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return coverage@k over the tasks of all rounds, what is expected, and how many points they differ."""
    found = {}
    for k in SAMPLES:
        measured = statistics.fmean(one["coverage"][f"at_{k}"] for one in rounds)
        expected = 1 - (1 - RIGHT) ** k
        found[str(k)] = {
            "measured": round(measured, 4),
            "expected": round(expected, 4),
            "points": round((measured - expected) * 100, 2),
        }
    return found


async def run(rounds: int = ROUNDS, *, quick: bool = False) -> dict[str, Any]:
    """Start everything, measure, stop everything."""
    sizes = Sizes(quick=quick)
    with ExitStack() as started:
        folder = Path(started.enter_context(tempfile.TemporaryDirectory(prefix="hive-bench-")))
        script = Script(tokens=1_000, first_token_ms=PACE_MS, pace_ms=PACE_MS)
        model = started.enter_context(ScriptedProcess(folder, script))
        async with fleet(DEVICES, SLOTS, model.url) as made:
            agents = Agents(made)
            async with made.client() as client:
                found = [await one_round(made, client, agents, model, number, sizes) for number in range(rounds)]
            log = made.installation.verify()
    result: dict[str, Any] = {"rounds": rounds, "devices": DEVICES, "slots": SLOTS, "right": RIGHT}
    result |= {"under_way": CALLERS, "parted": sizes.parted, "parted_under_way": PARTED_CALLERS}
    result |= {"tasks": {str(k): tasks * rounds for k, tasks in sizes.samples.items()}, "hedged": sizes.hedged}
    result |= {name: spreads([one[name] for one in found]) for name in found[0]}
    return result | {"coverage_pooled": pooled(found), "cuts": cuts(found), "log": {"ok": log["ok"]}}


def progress(text: str) -> None:
    """Say what is being measured."""
    print(f"bench: speculation: {text}", file=sys.stderr, flush=True)


def main() -> None:
    """Measure, print, and unless it was quick keep the results and write the tables of the documentation."""
    run_part("speculation", __doc__, run)


if __name__ == "__main__":
    main()
