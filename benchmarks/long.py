"""`make bench-long`: a log of 10⁵ tasks beside one of 10³, and how long restarts take with it.

Two installations run on the same machine. One is filled with tasks, the other has only a thousand; then both run
the same job by turns, so that a busy machine slows both and the ratio within a round still says what the log
costs. Afterwards the scheduler of the filled one is killed with thousands of tasks in flight, several times, and
every other service once. At the end the auditor verifies what all of that has left in the log.
"""

import asyncio
import contextlib
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import psutil
import psycopg
import uvloop
from hive_common.testing.installation import Installation

from benchmarks import report
from benchmarks.__main__ import about, progress
from benchmarks.rounds import spread
from benchmarks.stack import job, submit_and_wait, write_agents

TASKS_FEW = 1_000
TASKS_MANY = int(os.environ.get("HIVE_BENCH_LONG_TASKS", "100000"))
JOB_TASKS = 1_000
SINGLES_SHARE = 50
"""One in so many tasks of the filling is a job of its own: a log has many small jobs, too."""
ROUNDS = int(os.environ.get("HIVE_BENCH_LONG_ROUNDS", "7"))
KILLS = int(os.environ.get("HIVE_BENCH_LONG_KILLS", "3"))
OPEN_TASKS = 5_000
IN_FLIGHT = 2
SETTLE_S = 1.5
HEALTHY_S = 31.0
"""After this time the supervisor starts a process again at once; before, it pauses longer each time."""
PATIENCE_S = 600.0
POLL_S = 0.01
TRY_S = 10.0
SERVICES = ("registry", "router", "audit", "gateway", "scheduler")
SERVERS = ("nats", "postgres")

_COUNT_TASKS = "SELECT count(*) FROM log.events WHERE type = 'TaskSucceeded'"
_COUNT = "SELECT count(*) FROM log.events WHERE position > %s AND type = ANY(%s)"
_HEAD = "SELECT max(position) FROM log.events"
_EPOCH = "SELECT epoch FROM scheduler.leadership"
_PLACED = "SELECT position FROM log.events WHERE position > %s AND type = 'TaskAssigned' ORDER BY position LIMIT 1"
_SIZE = "SELECT pg_database_size(current_database())"

T = TypeVar("T")


class Stack:
    """An installation, with what asks it.

    Args:
        installation: up.
        client: of its REST API.
        connection: to its Postgres, as the superuser.
    """

    def __init__(
        self,
        installation: Installation,
        client: aiohttp.ClientSession,
        connection: psycopg.AsyncConnection[Any],
    ) -> None:
        self.installation = installation
        self.client = client
        self._connection = connection

    async def first(self, query: str, *values: Any) -> int | None:
        """Return the one number that a query finds."""
        row = await (await self._connection.execute(query.encode(), values)).fetchone()
        return None if row is None else int(row[0])

    async def number(self, query: str, *values: Any) -> int:
        """Return the one number that a query always finds."""
        found = await self.first(query, *values)
        assert found is not None, query
        return found

    async def submit(self, tasks: int | None) -> str:
        """Submit a job of so many no-ops and return its id."""
        async with self.client.post("/v1/jobs", json=job("command", tasks)) as answer:
            job_id: str = (await answer.json())["job_id"]
            return job_id

    def cpu_s(self) -> dict[str, float]:
        """Return the CPU seconds of every part so far, children that live or have ended included."""
        found: dict[str, float] = {}
        for name, pid in self.installation.pids().items():
            parent = psutil.Process(pid)
            used = 0.0
            for process in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    used += sum(process.cpu_times()[:4])
            found[name] = used
        return found

    def memory_mb(self) -> dict[str, float]:
        """Return the proportional set size of every part."""
        found: dict[str, float] = {}
        for name, pid in self.installation.pids().items():
            parent = psutil.Process(pid)
            pss = 0
            for process in [parent, *parent.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    pss += process.memory_full_info().pss
            found[name] = round(pss / 1e6, 1)
        return found

    async def ready(self, name: str) -> bool:
        """Say whether a service calls itself ready."""
        config = json.loads((self.installation.home / "config" / f"{name}.json").read_text())
        url = f"http://{config['ops_host']}:{config['ops_port']}/readyz"
        try:
            async with self.client.get(url, raise_for_status=False) as answer:
                return answer.status == 200
        except aiohttp.ClientError:
            return False


@contextlib.asynccontextmanager
async def started(folder: Path, agents: dict[str, Path]) -> AsyncIterator[Stack]:
    """Run an installation of one executor in `folder`, warm."""
    installation = Installation(folder)
    try:
        installation.up(executors=1)
        installation.hive("agent", "push", *(str(path) for path in agents.values()))
        status = installation.json("status")
        key = (installation.home / "api-key").read_text().strip()
        async with (
            aiohttp.ClientSession(
                status["endpoints"]["http"],
                headers={"Authorization": f"Bearer {key}"},
                timeout=aiohttp.ClientTimeout(PATIENCE_S),
                raise_for_status=True,
            ) as client,
            await psycopg.AsyncConnection.connect(installation.admin_dsn(), autocommit=True) as connection,
        ):
            await submit_and_wait(client, job("command", 100))
            yield Stack(installation, client, connection)
    finally:
        installation.hive("down", check=False)


async def until(what: str, probe: Callable[[], Awaitable[T]], poll_s: float = POLL_S) -> T:
    """Ask until the answer is something, and return it. Raises `TimeoutError`, naming `what`."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := await probe()):
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE_S:g} s: {what}")
        await asyncio.sleep(poll_s)
    return found


async def fill(stack: Stack, tasks: int) -> float:
    """Run jobs until `tasks` have succeeded, and return the rate of all of it."""
    began = time.perf_counter()
    before = await stack.number(_COUNT_TASKS)
    missing = max(0, tasks - before)
    singles = missing // SINGLES_SHARE
    left = [JOB_TASKS] * ((missing - singles) // JOB_TASKS) + [None] * singles
    rest = missing - singles - left.count(JOB_TASKS) * JOB_TASKS
    work = iter([*left, rest] if rest else left)
    done = 0

    async def caller() -> None:
        nonlocal done
        for size in work:
            await submit_and_wait(stack.client, job("command", size))
            reached = done + (size or 1)
            if reached // 5_000 > done // 5_000:
                rate = reached / (time.perf_counter() - began)
                progress(f"  {before + reached:,} of {tasks:,} tasks, {rate:,.0f}/s, load {os.getloadavg()[0]:.1f}")
            done = reached

    await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
    return done / (time.perf_counter() - began) if done else 0.0


async def window(stack: Stack) -> dict[str, Any]:
    """Run one job and return tasks per second, as the log has them, and CPU per task by part."""
    before = stack.cpu_s()
    job_id, _ = await submit_and_wait(stack.client, job("command", JOB_TASKS))
    async with stack.client.get(f"/v1/jobs/{job_id}") as answer:
        shown = await answer.json()
    assert shown["state"] == "succeeded", shown
    # What follows a job (views, auditor, relay) belongs to its price, and must not be another one's.
    await asyncio.sleep(SETTLE_S)
    after = stack.cpu_s()
    used = {name: (after[name] - before[name]) / JOB_TASKS * 1e3 for name in after}
    seconds = (shown["ended_us"] - shown["submitted_us"]) / 1e6
    return {"tasks_per_s": JOB_TASKS / seconds, "cpu_ms": used, "cpu_ms_all": sum(used.values())}


async def compare(few: Stack, many: Stack) -> dict[str, Any]:
    """Run the same job in both by turns, first in one and then in the other."""
    rounds: list[tuple[dict[str, Any], dict[str, Any]]] = []
    for number in range(ROUNDS):
        stacks = (few, many) if number % 2 == 0 else (many, few)
        found = {id(stack): await window(stack) for stack in stacks}
        rounds.append((found[id(few)], found[id(many)]))
        rates = " and ".join(f"{one['tasks_per_s']:,.0f}/s, {one['cpu_ms_all']:.2f} ms" for one in rounds[-1])
        progress(f"  round {number + 1} of {ROUNDS}: {rates} of CPU a task")
    result: dict[str, Any] = {}
    for place, name in enumerate(("few", "many")):
        shown = [one[place] for one in rounds]
        result[name] = {
            "tasks_per_s": spread(one["tasks_per_s"] for one in shown),
            "cpu_ms": spread(one["cpu_ms_all"] for one in shown),
            "cpu_ms_by_part": {
                part: round(statistics.median(one["cpu_ms"][part] for one in shown), 3)
                for part in shown[0]["cpu_ms"]
            },
        }
    result["rate_share"] = spread(many["tasks_per_s"] / few["tasks_per_s"] for few, many in rounds)
    result["cpu_share"] = spread(many["cpu_ms_all"] / few["cpu_ms_all"] for few, many in rounds)
    return result


class Killed:
    """A process that was just killed.

    Args:
        stack: whose process.
        name: of the process.

    Attributes:
        at: when, by `time.monotonic`.
    """

    def __init__(self, stack: Stack, name: str) -> None:
        process = psutil.Process(stack.installation.pids()[name])
        self._pid = process.pid
        self._command = process.cmdline()
        self._supervisor = process.parent()
        self.at = time.monotonic()
        stack.installation.kill(self._pid)

    async def gone(self) -> bool:
        """Say whether it has ended."""
        return not psutil.pid_exists(self._pid) or psutil.Process(self._pid).status() == psutil.STATUS_ZOMBIE

    def cpu_s(self) -> float:
        """Return the CPU seconds of the process that was started in its place, 0.0 while there is none."""
        assert self._supervisor is not None
        for child in self._supervisor.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if child.cmdline() == self._command and child.pid != self._pid:
                    return sum(child.cpu_times()[:2])
        return 0.0


async def kill(stack: Stack, name: str) -> Killed:
    """Kill a process, and wait until it is gone, so that it does not call itself ready any more."""
    killed = Killed(stack, name)
    await until(f"{name} is gone", killed.gone, 0.001)
    return killed


async def restart_scheduler(stack: Stack) -> dict[str, float]:
    """Kill the leader with tasks in flight; return when there is a leader, a ready one, and a task it placed."""
    start = await stack.number(_HEAD)
    jobs = [await stack.submit(OPEN_TASKS) for _ in range(2)]

    async def open_tasks() -> int:
        made = await stack.number(_COUNT, start, ["TaskCreated"])
        ended = await stack.number(_COUNT, start, ["TaskSucceeded", "TaskFailed", "TaskCancelled"])
        return made - ended if made >= 2 * OPEN_TASKS or made - ended >= OPEN_TASKS else 0

    opened = await until(f"{OPEN_TASKS} tasks are open", open_tasks)
    epoch = await stack.number(_EPOCH)
    killed = await kill(stack, "scheduler")

    async def leads() -> bool:
        return await stack.number(_EPOCH) > epoch

    await until("a scheduler leads", leads)
    head, lead_s = await stack.number(_HEAD), time.monotonic() - killed.at

    async def placed() -> bool:
        return await stack.first(_PLACED, head) is not None

    first, ready = await asyncio.gather(
        _seconds(killed.at, until("a task is placed", placed)),
        _seconds(killed.at, until("the scheduler is ready", lambda: stack.ready("scheduler"))),
    )
    cpu_s = killed.cpu_s()

    async def ended() -> bool:
        return await stack.number(_COUNT, start, ["JobSucceeded"]) == len(jobs)

    await until("the jobs have ended", ended, 0.5)
    return {"open_tasks": opened, "leads_s": lead_s, "ready_s": ready, "placed_s": first, "cpu_s": cpu_s}


async def _seconds(since: float, work: Awaitable[Any]) -> float:
    await work
    return time.monotonic() - since


async def restart_services(stack: Stack) -> tuple[dict[str, float], dict[str, float]]:
    """Kill every service once, idle; return the seconds until it is ready again, and its CPU seconds until then."""
    seconds: dict[str, float] = {}
    cpu: dict[str, float] = {}
    for name in SERVICES:
        killed = await kill(stack, name)
        await until(f"{name} is ready", lambda name=name: stack.ready(name))  # type: ignore[misc]
        seconds[name], cpu[name] = round(time.monotonic() - killed.at, 2), round(killed.cpu_s(), 2)
        progress(f"  {name} is ready {seconds[name]} s after kill -9, with {cpu[name]} s of CPU")
    return seconds, cpu


async def restart_servers(stack: Stack) -> dict[str, float]:
    """Kill PostgreSQL and NATS, idle; return the seconds until a job that is submitted from then on is done."""
    found: dict[str, float] = {}
    for name in SERVERS:
        killed = await kill(stack, name)

        async def done() -> bool:
            # One that is asked too early may be refused, or wait longer than the next one.
            try:
                async with asyncio.timeout(TRY_S):
                    job_id, _ = await submit_and_wait(stack.client, job("command"))
                    async with stack.client.get(f"/v1/jobs/{job_id}") as answer:
                        return bool((await answer.json())["state"] == "succeeded")
            except (aiohttp.ClientError, TimeoutError):
                return False

        await until(f"a job is done after {name} was killed", done, 0.05)
        found[name] = round(time.monotonic() - killed.at, 2)
        progress(f"  a job is done {found[name]} s after kill -9 of {name}")
        await until("everything is ready", lambda: _all_ready(stack), 0.5)
    return found


async def _all_ready(stack: Stack) -> bool:
    return all([await stack.ready(name) for name in SERVICES])


async def measure(few: Stack, many: Stack) -> dict[str, Any]:
    """Fill, compare, kill, verify."""
    await fill(few, TASKS_FEW)
    progress(f"filling the log with {TASKS_MANY:,} tasks")
    rate = await fill(many, TASKS_MANY)
    result: dict[str, Any] = {
        "filled_per_s": round(rate, 1),
        "tasks_few": await few.number(_COUNT_TASKS),
        "tasks_many": await many.number(_COUNT_TASKS),
        "events_many": await many.number(_HEAD),
        "database_mb": round(await many.number(_SIZE) / 1e6),
    }
    progress(f"{ROUNDS} rounds of {JOB_TASKS:,} tasks in either")
    result |= await compare(few, many)
    result["memory_mb"] = {"few": few.memory_mb(), "many": many.memory_mb()}
    restarts = []
    for number in range(KILLS):
        progress(f"kill -9 of the scheduler with {OPEN_TASKS:,} tasks open, {number + 1} of {KILLS}")
        await asyncio.sleep(HEALTHY_S)
        restarts.append(await restart_scheduler(many))
        progress("  " + ", ".join(f"{key} {value:.2f}" for key, value in restarts[-1].items()))
    result["restart_open"] = {key: spread(one[key] for one in restarts) for key in restarts[0]}
    progress("kill -9 of each service")
    await asyncio.sleep(HEALTHY_S)
    result["restart_ready_s"], result["restart_cpu_s"] = await restart_services(many)
    result["restart_servers_s"] = await restart_servers(many)
    progress("verifying the log")
    result["log"] = many.installation.json("audit", "verify", check=False, timeout_s=PATIENCE_S)
    return result


async def run() -> dict[str, Any]:
    """Run the benchmark in scratch homes."""
    scratch = Path(tempfile.mkdtemp(prefix="hive-bench-"))
    agents = write_agents(scratch)
    described = {key: value for key, value in about().items() if key != "peers"}
    try:
        async with started(scratch / "many", agents) as many, started(scratch / "few", agents) as few:
            result = await measure(few, many)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    described["load_average_after"] = [round(load, 1) for load in os.getloadavg()]
    return {"about": described, **result}


def main() -> None:
    """Run, print and keep the results, and write the table of the documentation."""
    result = uvloop.run(run())
    print(json.dumps(result, indent=2))
    if os.environ.get("HIVE_BENCH_KEEP", "1") == "0":
        return
    progress(f"written to {report.keep('long', result)} and {report.DOCUMENT}")


if __name__ == "__main__":
    main()
