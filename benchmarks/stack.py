"""The whole stack: no-op tasks per second, and the time from submit to result, beside the sandbox alone."""

import asyncio
import json
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import wasmtime
from hive_common.contracts.limits import FUEL_DEFAULT, MIB
from hive_common.contracts.values import digest_of
from hive_common.testing.installation import Installation
from hive_executor.sandbox import Limits, Program, RunnerPool
from hive_executor.sandbox.warm import default_cache_dir

TASKS = 2_000
ROUND_TRIPS = 100

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


def job(runtime: str, tasks: int) -> dict[str, Any]:
    """Return a job document that forks `tasks` no-ops."""
    task = {"id": "noop", "agent": f"noop-{runtime}@1.0.0", "fork": "${input}", "input": {}}
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": f"bench-{runtime}",
        "input": list(range(tasks)),
        "limits": {"deadline": "10m", "fan_out": tasks},
        "tasks": [task],
    }


async def submit_and_wait(client: httpx.AsyncClient, document: dict[str, Any]) -> tuple[str, float]:
    """Submit, follow the stream to its end, and return the job's id and the seconds that took."""
    start = time.perf_counter()
    answer = await client.post("/v1/jobs", json=document)
    answer.raise_for_status()
    job_id: str = answer.json()["job_id"]
    async with client.stream("GET", f"/v1/jobs/{job_id}/stream") as stream:
        async for line in stream.aiter_lines():
            if line == "data: [DONE]":
                break
    return job_id, time.perf_counter() - start


async def fork_rate(client: httpx.AsyncClient, runtime: str) -> float:
    """Return tasks per second of one job, from its submit to its end as the log has them."""
    job_id, _ = await submit_and_wait(client, job(runtime, TASKS))
    shown = (await client.get(f"/v1/jobs/{job_id}")).json()
    assert shown["state"] == "succeeded", shown
    return TASKS / ((shown["ended_us"] - shown["submitted_us"]) / 1e6)


async def round_trips(client: httpx.AsyncClient, runtime: str) -> dict[str, float]:
    """Return p50 and p99 in milliseconds of single submits on an idle stack."""
    times = sorted([(await submit_and_wait(client, job(runtime, 1)))[1] * 1e3 for _ in range(ROUND_TRIPS)])
    return {"p50_ms": round(statistics.median(times), 2), "p99_ms": round(times[int(len(times) * 0.99) - 1], 2)}


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
        outcomes = await asyncio.gather(*(pool.run(program, b"{}", limits) for _ in range(TASKS)))
        seconds = time.perf_counter() - start
    finally:
        await pool.close()
    assert all(outcome.status == "succeeded" for outcome in outcomes), outcomes[0]
    return TASKS / seconds


def resident_bytes(installation: Installation) -> int:
    """Return the proportional set size of every process of the stack."""
    return sum(process.memory_full_info().pss for process in installation.processes_tree())


async def run() -> dict[str, Any]:
    """Start an installation of its own, measure, stop it."""
    scratch = Path(tempfile.mkdtemp(prefix="hive-bench-"))
    installation = Installation(scratch / "home")
    folders = write_agents(scratch)
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
        }
        async with httpx.AsyncClient(
            base_url=status["endpoints"]["http"], headers={"Authorization": f"Bearer {key}"}, timeout=600
        ) as client:
            for runtime in folders:
                await submit_and_wait(client, job(runtime, 10))
                result[runtime] = {
                    "tasks_per_s": round(await fork_rate(client, runtime)),
                    "sandbox_alone_per_s": round(await sandbox_rate(folders, runtime, runners=2)),
                    "submit_to_result": await round_trips(client, runtime),
                }
        result["log"] = installation.verify()
    finally:
        installation.hive("down", check=False)
        shutil.rmtree(scratch, ignore_errors=True)
    return result


if __name__ == "__main__":
    print(json.dumps(asyncio.run(run()), indent=2))
