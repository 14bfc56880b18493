"""What the check of signatures costs a start: of a Python agent in a warm runner, with and without it by turns.

`python -m benchmarks.signing` prints milliseconds of wall time, and microseconds of CPU time of this process.
"""

import asyncio
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hive_cli.supervisor.runtime import default_cache_dir
from hive_common.artifacts.package import AgentPackage, pack, unpack
from hive_common.artifacts.signing import Signature, sign, unpack_signed
from hive_common.contracts.events import AgentRef
from hive_common.contracts.limits import LOG_BYTES_MAX, MIB, OUTPUT_BYTES_MAX
from hive_executor.agents import Agents
from hive_executor.blobs import FolderCache
from hive_executor.sandbox import Limits, Program, RunnerPool
from hive_executor.signers import Signers

from benchmarks.rounds import spread

ROUNDS = 10
STARTS_PER_ROUND = 100
COLD_PER_ROUND = 50
MANIFEST = "apiVersion: hive/v1\nkind: Agent\nname: noop\nversion: 1.0.0\nruntime: python\nentry: agent.py\n"
LIMITS = Limits(
    wall_ms=10_000, memory_bytes=64 * MIB, fuel=10**12, output_bytes=OUTPUT_BYTES_MAX, log_bytes=LOG_BYTES_MAX
)


class _Blobs:
    def __init__(self, blobs: dict[str, bytes]) -> None:
        self._blobs = blobs

    async def fetch(self, digest: str) -> bytes:
        return self._blobs[digest]


async def _round(count: int, call: Callable[[], Awaitable[Any]]) -> tuple[float, float]:
    """Return the median in ms of wall time, and µs of CPU time of this process for each."""
    samples, before = [], time.process_time()
    for _ in range(count):
        started = time.perf_counter()
        await call()
        samples.append((time.perf_counter() - started) * 1000)
    return statistics.median(samples), (time.process_time() - before) / count * 1e6


async def run() -> dict[str, Any]:
    """Measure on this machine, now."""
    with tempfile.TemporaryDirectory(prefix="hive-bench-") as name:
        folder = Path(name)
        (folder / "manifest.yaml").write_text(MANIFEST)
        (folder / "agent.py").write_text("def run(input):\n    return {}\n")
        package = pack(folder)
        signature = sign(package.digest, "noop", Ed25519PrivateKey.generate())
        pool = RunnerPool(size=1, cache_dir=default_cache_dir())
        await pool.start()
        try:
            return await _measured(folder, package, signature, pool)
        finally:
            await pool.close()


async def _measured(folder: Path, package: AgentPackage, signature: Signature, pool: RunnerPool) -> dict[str, Any]:
    resources = package.manifest.resources
    ref = AgentRef(
        *("noop", "1.0.0", package.digest, "python", resources.memory_bytes, resources.timeout_ms, resources.fuel),
        signer=signature.signer,
        signature=signature.digest,
    )
    signers = Signers(folder, lambda: None, lambda: None)
    signers.told([signature.signer], 1)
    blobs = _Blobs(package.blobs | signature.blobs)
    agents = Agents(blobs, FolderCache(folder / "modules", MIB), folder, signers)  # type: ignore[arg-type]
    known = await agents.program(ref)

    async def start(program: Program) -> None:
        outcome = await pool.run(program, b"{}", LIMITS)
        assert outcome.status == "succeeded", outcome

    async def checked() -> None:
        await start(await agents.program(ref))

    calls: dict[str, tuple[int, Callable[[], Awaitable[Any]]]] = {
        "warm_checked": (STARTS_PER_ROUND, checked),
        "warm_unchecked": (STARTS_PER_ROUND, lambda: start(known)),
        "check_alone": (STARTS_PER_ROUND, lambda: agents.program(ref)),
        "cold_checked": (
            COLD_PER_ROUND,
            lambda: unpack_signed(blobs.fetch, package.digest, signature.digest, (signature.signer,)),
        ),
        "cold_unchecked": (COLD_PER_ROUND, lambda: unpack(blobs.fetch, package.digest)),
    }
    found: dict[str, list[float]] = {}
    for number in range(ROUNDS + 1):
        measured = {}
        for name, (count, call) in sorted(calls.items(), reverse=number % 2 == 1):
            measured[name] = await _round(count, call)
        if number == 0:
            continue  # warms up
        for name, (wall_ms, cpu_us) in measured.items():
            found.setdefault(f"{name}_ms", []).append(wall_ms)
            found.setdefault(f"{name}_cpu_us", []).append(cpu_us)
        found.setdefault("warm_ratio", []).append(measured["warm_checked"][0] / measured["warm_unchecked"][0])
    return {name: spread(values, 4) for name, values in found.items()}


if __name__ == "__main__":
    for name, value in asyncio.run(run()).items():
        print(f"{name:>22}  {value}")
