"""The whole stack beside what bounds it and beside what people would pick instead, in interleaved rounds.

A round measures, one after the other and nothing at the same time: no-ops that one job forks, beside the sandbox
alone; single submits and the way from submit to result, beside the peers of `peers.py` and raw NATS request/reply.
The stack idles while others are measured; the peers' servers do not run while it is.
"""

import asyncio
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import aiohttp
import psycopg
import wasmtime
from hive_common.contracts.limits import FUEL_DEFAULT, MIB
from hive_common.contracts.values import digest_of
from hive_common.testing.installation import Installation
from hive_executor.sandbox import Limits, Program, RunnerPool
from hive_executor.sandbox.warm import default_cache_dir

from benchmarks import peer_runs, raw_nats
from benchmarks.cpu import CpuClock, measured
from benchmarks.rounds import percentiles, spread, spreads

TASKS = {
    "command": int(os.environ.get("HIVE_BENCH_TASKS", "5000")),
    "python": int(os.environ.get("HIVE_BENCH_PYTHON_TASKS", "5000")),
}
SINGLES = 1_000
IN_FLIGHT = 50
ROUND_TRIPS = 50
ROUNDS = int(os.environ.get("HIVE_BENCH_ROUNDS", "3"))
SETTLE_S = 2.0

MANIFEST = """\
apiVersion: hive/v1
kind: Agent
name: {name}
version: 1.0.0
runtime: {runtime}
entry: {entry}
input: {{type: object}}
output: {{type: object}}
resources: {{memory: 64Mi, timeout: 10s}}
permissions: {{}}
"""

PYTHON = b"def run(input: dict) -> dict:\n    return {}\n"

COMMAND = """\
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 16) "{}")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 16))
    (i32.store (i32.const 4) (i32.const 2))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))
"""


def write_agents(folder: Path) -> dict[str, Path]:
    """Write the two no-op agents and return their folders by runtime."""
    folders = {"python": folder / "noop-python", "command": folder / "noop-command"}
    for runtime, path in folders.items():
        path.mkdir()
        entry = "agent.py" if runtime == "python" else "noop.wasm"
        (path / "manifest.yaml").write_text(MANIFEST.format(name=path.name, runtime=runtime, entry=entry))
        (path / entry).write_bytes(PYTHON if runtime == "python" else bytes(wasmtime.wat2wasm(COMMAND)))
    return folders


def job(runtime: str, tasks: int | None = None) -> dict[str, Any]:
    """Return a job document that forks `tasks` no-ops, or has a single one."""
    fork = {} if tasks is None else {"fork": "${input}"}
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": f"bench-{runtime}",
        "input": list(range(tasks or 0)),
        "limits": {"deadline": "10m", "fan_out": tasks or 1},
        "tasks": [{"id": "noop", "agent": f"noop-{runtime}@1.0.0", **fork, "input": {}}],
    }


async def submit_and_wait(client: aiohttp.ClientSession, document: dict[str, Any]) -> tuple[str, float]:
    """Submit, follow the stream to its end, and return the job's id and the seconds that took."""
    start = time.perf_counter()
    async with client.post("/v1/jobs", json=document) as answer:
        job_id: str = (await answer.json())["job_id"]
    async with client.get(f"/v1/jobs/{job_id}/stream") as stream:
        async for line in stream.content:
            if line == b"data: [DONE]\n":
                break
    return job_id, time.perf_counter() - start


async def fork_rate(client: aiohttp.ClientSession, runtime: str) -> float:
    """Return tasks per second of one job, from its submit to its end as the log has them."""
    job_id, _ = await submit_and_wait(client, job(runtime, TASKS[runtime]))
    async with client.get(f"/v1/jobs/{job_id}") as answer:
        shown = await answer.json()
    assert shown["state"] == "succeeded", shown
    return TASKS[runtime] / ((shown["ended_us"] - shown["submitted_us"]) / 1e6)


async def round_trips(client: aiohttp.ClientSession, runtime: str) -> dict[str, float]:
    """Return p50 and p99 in milliseconds from submit to result, one job at a time on an idle stack."""
    return percentiles([(await submit_and_wait(client, job(runtime)))[1] * 1e3 for _ in range(ROUND_TRIPS)])


async def single_rate(client: aiohttp.ClientSession, dsn: str) -> float:
    """Return jobs of one WASI no-op per second, 50 callers at once, until the last success is in the log."""
    count = "SELECT count(*) FROM log.events WHERE position > %s AND type = 'JobSucceeded'"
    left = iter(range(SINGLES))

    async def caller() -> None:
        for _ in left:
            async with client.post("/v1/jobs", json=job("command")) as answer:
                await answer.read()

    async def first(query: str, *values: int) -> int:
        row = await (await connection.execute(query.encode(), values)).fetchone()
        assert row is not None
        return int(row[0])

    async with await psycopg.AsyncConnection.connect(dsn, autocommit=True) as connection:
        before = await first("SELECT max(position) FROM log.events")
        start = time.perf_counter()
        await asyncio.gather(*(caller() for _ in range(IN_FLIGHT)))
        while await first(count, before) < SINGLES:
            await asyncio.sleep(0.02)
        return SINGLES / (time.perf_counter() - start)


async def sandbox_rate(folders: dict[str, Path], runtime: str, runners: int) -> float:
    """Return no-ops per second of the runners alone: what the stack cannot exceed."""
    pool = RunnerPool(size=runners, cache_dir=default_cache_dir())
    folder = folders[runtime]
    module = None if runtime == "python" else folder / "noop.wasm"
    content = PYTHON if module is None else module.read_bytes()
    program = Program(
        runtime=runtime,  # type: ignore[arg-type]
        digest=digest_of(content),
        entry="agent.py" if module is None else module.name,
        files={"agent.py": PYTHON} if module is None else None,
        module_path=module,
    )
    limits = Limits(wall_ms=10_000, memory_bytes=64 * MIB, fuel=FUEL_DEFAULT)
    await pool.start()
    try:
        await asyncio.gather(*(pool.run(program, b"{}", limits) for _ in range(50)))
        start = time.perf_counter()
        outcomes = await asyncio.gather(*(pool.run(program, b"{}", limits) for _ in range(TASKS[runtime])))
        seconds = time.perf_counter() - start
    finally:
        await pool.close()
    assert all(outcome.status == "succeeded" for outcome in outcomes), outcomes[0]
    return TASKS[runtime] / seconds


def resident_bytes(installation: Installation) -> int:
    """Return the proportional set size of every process of the stack."""
    return sum(process.memory_full_info().pss for process in installation.processes_tree())


async def one_round(
    client: aiohttp.ClientSession,
    dsn: str,
    folders: dict[str, Path],
    servers: peer_runs.PeerServers | None,
    scratch: Path,
    clock: CpuClock,
) -> dict[str, Mapping[str, float]]:
    """Measure everything once."""
    found: dict[str, Mapping[str, float]] = {}
    for runtime in folders:
        alone = await sandbox_rate(folders, runtime, runners=2)
        tasks, found[f"cpu_fork_{runtime}"] = await measured(clock, TASKS[runtime], fork_rate(client, runtime))
        found[f"fork_{runtime}"] = {"tasks_per_s": tasks, "sandbox_alone_per_s": alone, "share": tasks / alone}
    singles, found["cpu_single_command"] = await measured(clock, SINGLES, single_rate(client, dsn))
    found["single_command"] = {"tasks_per_s": singles}
    for system in peer_runs.SYSTEMS if servers else ():
        assert servers is not None
        try:
            found[system] = await servers.measure(system)
        except (RuntimeError, TimeoutError) as error:
            # Ten minutes of other figures do not go for one peer's sake: its row says that a round is missing.
            print(f"bench: {system}: {error!r}", file=sys.stderr, flush=True)
    await asyncio.sleep(SETTLE_S)
    for runtime in folders:
        found[f"round_trip_{runtime}"] = await round_trips(client, runtime)
    found["raw_nats"] = await raw_nats.measure(Path(tempfile.mkdtemp(dir=scratch)))
    found["load"] = {"average_1min": os.getloadavg()[0]}
    return found


def ratios(rounds: list[dict[str, Mapping[str, float]]]) -> dict[str, dict[str, float]]:
    """Return the ratio of single submits to each peer's, within each round."""

    def rate(one: dict[str, Mapping[str, float]], system: str) -> float:
        return one["single_command"]["tasks_per_s"] / one[system]["tasks_per_s"]

    systems = [system for system in peer_runs.SYSTEMS if any(system in one for one in rounds)]
    return {system: spread(rate(one, system) for one in rounds if system in one) for system in systems}


async def run() -> dict[str, Any]:
    """Start an installation of its own, measure, stop it."""
    scratch = Path(tempfile.mkdtemp(prefix="hive-bench-"))
    installation = Installation(scratch / "home")
    folders = write_agents(scratch)
    servers = peer_runs.PeerServers(scratch / "peers") if peer_runs.interpreter() else None
    try:
        start = time.perf_counter()
        installation.up(executors=1)
        up_s = time.perf_counter() - start
        installation.hive("agent", "push", *(str(folder) for folder in folders.values()))
        status = installation.json("status")
        memory = resident_bytes(installation)
        key = (installation.home / "api-key").read_text().strip()
        result: dict[str, Any] = {
            "up_s": round(up_s, 1),
            "idle_stack_mb": round(memory / 1e6),
            "processes": len(installation.processes_tree()),
            "tasks": TASKS,
            "singles": SINGLES,
        }
        # httpx takes 3 ms of CPU for a submit, half of what all of the stack takes; aiohttp a tenth of that.
        async with aiohttp.ClientSession(
            status["endpoints"]["http"],
            headers={"Authorization": f"Bearer {key}"},
            timeout=aiohttp.ClientTimeout(600),
            raise_for_status=True,
        ) as client:
            for runtime in folders:
                await submit_and_wait(client, job(runtime, 100))
            dsn = installation.admin_dsn()
            clock = CpuClock(installation)
            rounds = [await one_round(client, dsn, folders, servers, scratch, clock) for _ in range(ROUNDS)]
        names = dict.fromkeys(name for one in rounds for name in one)
        result |= {name: spreads([one[name] for one in rounds if name in one]) for name in names}
        result["rounds"] = {name: sum(name in one for one in rounds) for name in names}
        result["single_to_peer"] = ratios(rounds)
        result["log"] = installation.verify()
    finally:
        installation.hive("down", check=False)
        shutil.rmtree(scratch, ignore_errors=True)
    return result


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run()), indent=2))
