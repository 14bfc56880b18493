"""CPU time of each process of the stack per task, which other work on the machine disturbs far less than rates.

`python -m benchmarks.cpu` starts an installation and measures forks, single submits and round trips in turns; it
prints the medians as a table. `benchmarks.stack` takes the same figures beside its rates.
"""

import argparse
import asyncio
import shutil
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import aiohttp
import psutil
from hive_common.testing.installation import Installation

Seconds = dict[str, float]
T = TypeVar("T")

CLIENT = "the client"
"""This process: it is no part of the stack and takes from the same cores."""
SETTLE_S = 1.5
"""Until views, relay and auditor have caught up with what was committed: their work belongs to its tasks."""


class CpuClock:
    """Reads how much CPU time the processes of an installation have used so far."""

    def __init__(self, installation: Installation) -> None:
        self._processes = {name: psutil.Process(pid) for name, pid in installation.pids().items()}

    def read(self) -> Seconds:
        """Return CPU seconds by process with all of its children; executors are one."""
        total: defaultdict[str, float] = defaultdict(float)
        total[CLIENT] = time.process_time()
        for name, process in self._processes.items():
            total["executor and runners" if name.startswith("executor") else name] += _seconds_of(process)
        return dict(total)


def _seconds_of(process: psutil.Process) -> float:
    """Return the seconds of a process, its children that live, and those that it has waited for."""
    seconds = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            seconds += sum(one.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue  # ended since it was listed: its parent has its time
    return seconds


def per_task_ms(before: Seconds, after: Seconds, tasks: int) -> dict[str, float]:
    """Return milliseconds of CPU per task by process, and the sum of the stack's as `all`."""
    found = {name: (after[name] - before[name]) * 1_000 / tasks for name in before}
    return {**found, "all": sum(found.values()) - found[CLIENT]}


async def measured(clock: CpuClock, tasks: int, work: Awaitable[T]) -> tuple[T, dict[str, float]]:
    """Return what work of so many tasks gave, and what a task cost by process."""
    before = clock.read()
    result = await work
    await asyncio.sleep(SETTLE_S)
    return result, per_task_ms(before, clock.read(), tasks)


async def main() -> None:
    """Measure and print."""
    # Here, since `benchmarks.stack` takes this module's figures as well.
    from benchmarks import stack

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", type=int, default=3_000, help="no-ops that one job forks")
    options = parser.parse_args()
    scratch = Path(tempfile.mkdtemp(prefix="hive-cpu-"))
    installation = Installation(scratch / "home")
    folders = stack.write_agents(scratch)
    stack.TASKS["command"] = options.tasks
    rates: defaultdict[str, list[float]] = defaultdict(list)
    costs: defaultdict[str, list[dict[str, float]]] = defaultdict(list)
    try:
        installation.up(executors=1)
        installation.hive("agent", "push", str(folders["command"]))
        status = installation.json("status")
        dsn = installation.admin_dsn()
        key = (installation.home / "api-key").read_text().strip()
        async with aiohttp.ClientSession(
            status["endpoints"]["http"],
            headers={"Authorization": f"Bearer {key}"},
            timeout=aiohttp.ClientTimeout(600),
            raise_for_status=True,
        ) as client:
            clock = CpuClock(installation)

            async def taken(what: str, rate: str, tasks: int, work: Awaitable[float]) -> None:
                figure, cost = await measured(clock, tasks, work)
                rates[rate].append(figure)
                costs[what].append(cost)

            async def trip() -> float:
                return (await stack.round_trips(client, "command"))["p50_ms"]

            await stack.submit_and_wait(client, stack.job("command", 100))
            for _ in range(options.rounds):
                await taken("fork", "fork, tasks/s", options.tasks, stack.fork_rate(client, "command"))
                await taken("singles", "singles, jobs/s", stack.SINGLES, stack.single_rate(client, dsn))
                await taken("round trips", "round trip p50, ms", stack.ROUND_TRIPS, trip())
    finally:
        installation.hive("down", check=False)
        shutil.rmtree(scratch, ignore_errors=True)
    _show(costs, rates)


def _show(costs: dict[str, list[dict[str, float]]], rates: dict[str, list[float]]) -> None:
    names = list(next(iter(costs.values()))[0])
    print("| CPU ms per task | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for what, rounds in costs.items():
        medians = (statistics.median(one[name] for one in rounds) for name in names)
        print(f"| {what} | " + " | ".join(f"{value:.2f}" for value in medians) + " |")
    for what, values in rates.items():
        print(f"{what}: {statistics.median(values):.1f} ({min(values):.1f} to {max(values):.1f})")


if __name__ == "__main__":
    asyncio.run(main())
