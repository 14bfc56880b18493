"""What the sandbox adds to the engine: attempts in a warm runner beside raw wasmtime-py, in interleaved rounds.

`run()` returns milliseconds (medians of each round, with their spread), ratios, and a runner's private memory. An
attempt that is cancelled while it sleeps has its CPU (of pool and runners), and the time until its slot is free.
"""

import asyncio
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import wasmtime
from hive_executor.sandbox import Limits, Program, RunnerPool, prepare, prepare_python_runtime
from hive_executor.sandbox.compiler import Compiler
from hive_executor.sandbox.engine import engine_version, new_engine
from hive_executor.sandbox.guests import bundle_of, new_component_linker
from hive_executor.sandbox.warm import default_cache_dir
from wasmtime import component

from benchmarks.rounds import spread

ROUNDS = 20
ATTEMPTS_PER_ROUND = 25
CANCELS_PER_ROUND = 5
LIMITS = Limits(wall_ms=10_000, memory_bytes=64 << 20, fuel=1 << 40)
AGENT = {"agent.py": b"def run(input):\n    return {}\n"}
SLEEPER = {"agent.py": b"import time\ndef run(input):\n    print('up')\n    time.sleep(9)\n"}
COMMAND = """
(module
  (import "wasi_snapshot_preview1" "fd_write" (func $fd_write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 64) "{}")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 64))
    (i32.store (i32.const 4) (i32.const 2))
    (drop (call $fd_write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))
"""


def _store(engine: wasmtime.Engine) -> wasmtime.Store:
    store = wasmtime.Store(engine)
    store.set_fuel(1 << 40)
    store.set_epoch_deadline(1)
    store.set_limits(256 << 20, 200_000, 64, 16, 4)
    wasi = wasmtime.WasiConfig()
    wasi.stdout_custom = len
    wasi.stderr_custom = len
    store.set_wasi(wasi)
    return store


def raw_python(path: Path) -> Callable[[], None]:
    """Return the least that runs the no-op agent with wasmtime-py alone."""
    engine = new_engine()
    module = component.Component.deserialize_file(engine, str(path))
    linker = new_component_linker(engine, lambda *_: None, lambda *_: None)

    def call(bundle: str) -> Any:
        store = _store(engine)
        function = linker.instantiate(store, module).get_func(store, "run")
        assert function is not None
        result = function(store, bundle, "{}")
        store.close()
        return result

    # As a runner does: an agent is compiled once.
    bundle = bundle_of("agent.py", AGENT, code=json.loads(call(bundle_of("agent.py", AGENT, compile=True))))

    def run() -> None:
        assert call(bundle) == "{}"

    return run


def raw_command(path: Path) -> Callable[[], None]:
    """Return the least that runs the no-op command with wasmtime-py alone."""
    engine = new_engine()
    module = wasmtime.Module.deserialize_file(engine, str(path))
    linker = wasmtime.Linker(engine)
    linker.define_wasi()

    def run() -> None:
        store = _store(engine)
        start: Any = linker.instantiate(store, module).exports(store)["_start"]
        start(store)
        store.close()

    return run


def _time_calls(call: Callable[[], None]) -> list[float]:
    samples = []
    for _ in range(ATTEMPTS_PER_ROUND):
        started = time.perf_counter()
        call()
        samples.append((time.perf_counter() - started) * 1000)
    return samples


async def _time_attempts(attempt: Callable[[], Awaitable[None]]) -> list[float]:
    samples = []
    for _ in range(ATTEMPTS_PER_ROUND):
        started = time.perf_counter()
        await attempt()
        samples.append((time.perf_counter() - started) * 1000)
    return samples


def _cpu_s() -> float:
    """Return the CPU time of this process and all that it has started, those that have ended included."""
    total = sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    for process in (psutil.Process(), *psutil.Process().children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system
    return total


async def _cancel_one(pool: RunnerPool, program: Program) -> float:
    """Cancel an attempt that sleeps; return the milliseconds until its slot is free."""
    up = asyncio.Event()
    attempt = asyncio.create_task(pool.run(program, b"{}", LIMITS, on_log=lambda _: up.set()))
    await up.wait()
    started = time.perf_counter()
    attempt.cancel()
    await asyncio.wait({attempt})
    return (time.perf_counter() - started) * 1000


async def _cancelled(pool: RunnerPool) -> dict[str, Any]:
    sleeper = Program("python", "bench:sleeper", "agent.py", SLEEPER)
    cpu_ms, free_ms = [], []
    before = pool.stats()["restarts"]
    for _ in range(ROUNDS):
        started_s = _cpu_s()
        free_ms.append(statistics.median([await _cancel_one(pool, sleeper) for _ in range(CANCELS_PER_ROUND)]))
        # With a runner for the next one, where it takes a new one.
        while not pool.stats()["pids"]:
            await asyncio.sleep(0.01)
        cpu_ms.append((_cpu_s() - started_s) * 1000 / CANCELS_PER_ROUND)
    return {
        "cancelled_cpu_ms": spread(cpu_ms),
        "cancelled_free_ms": spread(free_ms),
        "cancelled_restarts": pool.stats()["restarts"] - before,
    }


async def run(cache_dir: Path | None = None) -> dict[str, Any]:
    """Measure on this machine, now."""
    cache = cache_dir or default_cache_dir()
    python_path = await prepare_python_runtime(cache)
    with tempfile.TemporaryDirectory() as folder:
        wasm = Path(folder) / "noop.wasm"
        wasm.write_bytes(wasmtime.wat2wasm(COMMAND))
        command = Program("command", "bench:noop", "noop.wasm", module_path=wasm)
        await prepare(command, cache)
        command_path = (await Compiler(cache).compiled(command)).path
        agent = Program("python", "bench:noop-python", "agent.py", AGENT)
        pool = RunnerPool(size=1, cache_dir=cache)
        await pool.start()
        try:
            return await _measure(pool, agent, command, raw_python(python_path), raw_command(command_path))
        finally:
            await pool.close()


async def _measure(
    pool: RunnerPool,
    agent: Program,
    command: Program,
    raw_agent: Callable[[], None],
    raw_noop: Callable[[], None],
) -> dict[str, Any]:
    async def attempt(program: Program) -> None:
        outcome = await pool.run(program, b"{}", LIMITS)
        assert outcome.status == "succeeded", outcome

    # By scenario, the median of each round: one attempt more or less says nothing about a spread.
    samples: dict[str, list[float]] = {"python": [], "python_raw": [], "command": [], "command_raw": []}
    for _ in range(ROUNDS):
        samples["python_raw"].append(statistics.median(_time_calls(raw_agent)))
        samples["python"].append(statistics.median(await _time_attempts(lambda: attempt(agent))))
        samples["command_raw"].append(statistics.median(_time_calls(raw_noop)))
        samples["command"].append(statistics.median(await _time_attempts(lambda: attempt(command))))
    (pid,) = pool.stats()["pids"]
    memory = psutil.Process(pid).memory_full_info()
    cancelled = await _cancelled(pool)
    return {
        **{f"{name}_ms": spread(values) for name, values in samples.items()},
        "python_to_raw": spread(a / b for a, b in zip(samples["python"], samples["python_raw"], strict=True)),
        "command_to_raw": spread(a / b for a, b in zip(samples["command"], samples["command_raw"], strict=True)),
        "runner_private_mb": round(memory.uss / 1e6, 1),
        "runner_pss_mb": round(getattr(memory, "pss", 0) / 1e6, 1),
        **cancelled,
        "attempts_each": ROUNDS * ATTEMPTS_PER_ROUND,
        "wasmtime": engine_version(),
    }


if __name__ == "__main__":
    for name, value in asyncio.run(run()).items():
        print(f"{name:>20}  {value}")
