"""Runs `peers.py` in its own environment, each time on an empty database of a server with HiveFabric's settings."""

import asyncio
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hive_common.testing.nats import EmbeddedNats
from hive_common.testing.postgres import EmbeddedPostgres

from benchmarks import model_peers

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements-peers.txt"
PACKAGES = (
    *("pgqueuer", "asyncpg", "procrastinate", "dbos", "taskiq", "taskiq-nats", "nats-py", "psycopg"),
    *("langgraph", "langgraph-checkpoint-postgres", "langgraph-checkpoint-sqlite"),
)
SYSTEMS = ("pgqueuer", "procrastinate", "dbos_queue", "dbos_direct", "taskiq_lazy", "taskiq_always")
TIMEOUT_S = 120
TASKS = 1_000
TRIPS = 100


def environment() -> Path:
    """Return where the peers are installed: `$XDG_CACHE_HOME/hivefabric/bench-peers/<digest of the pins>`."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "hivefabric" / "bench-peers" / hashlib.sha256(REQUIREMENTS.read_bytes()).hexdigest()[:12]


def interpreter() -> Path | None:
    """Return the peers' Python, or None before `make bench-peers`."""
    python = environment() / "bin" / "python"
    return python if (environment() / ".ready").exists() else None


def install() -> None:
    """Make the environment, unless these very pins are installed already."""
    if interpreter():
        return
    uv = Path(sys.executable).with_name("uv")
    folder = environment()
    subprocess.run([uv, "venv", "-q", "--clear", "--python", sys.executable, folder], check=True)
    target = ["--python", str(folder / "bin" / "python")]
    subprocess.run(
        [uv, "pip", "install", "-q", "--system-certs", *target, "--require-hashes", "-r", REQUIREMENTS], check=True
    )
    (folder / ".ready").touch()


def versions() -> dict[str, str]:
    """Return the versions of what is compared."""
    code = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"
    python = interpreter()
    assert python is not None
    found: dict[str, str] = json.loads(subprocess.check_output([python, "-c", code, *PACKAGES]))
    return found


class PeerServers:
    """A Postgres and two NATS servers for the peers, up only while one of them is measured."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._runs = 0

    async def measure(self, system: str) -> dict[str, float]:
        """Run one system once.

        Raises:
            RuntimeError: it ended with another exit code than 0; with what it printed.
            TimeoutError: it did not end in time.
        """
        self._runs += 1
        folder = self._folder / f"{self._runs}-{system}"
        postgres = EmbeddedPostgres(folder / "postgres")
        # A second block of the same name replaces the first, its store with it.
        sync = "always" if system == "taskiq_always" else "2m"
        store = json.dumps(str(folder / "jetstream"))
        nats = EmbeddedNats(folder / "nats", f"jetstream {{ store_dir: {store}, sync_interval: {sync} }}\n")
        postgres.start()
        nats.start()
        try:
            settings = {"HIVE_BENCH_DSN": _database(postgres), "HIVE_BENCH_NATS": nats.url}
            figures: dict[str, float] = await _run("peers.py", system, str(TASKS), str(TRIPS), settings=settings)
            return figures
        finally:
            nats.stop()
            postgres.stop()

    async def graphs(self, system: str, graphs: list[Any], model_url: str) -> list[float]:
        """Run the graphs once, calls of which go to the scripted model at this address. Raises as `measure`."""
        self._runs += 1
        folder = self._folder / f"{self._runs}-{system}"
        postgres = EmbeddedPostgres(folder / "postgres")
        postgres.start()
        try:
            settings = {"HIVE_BENCH_DSN": _database(postgres), "HIVE_BENCH_FOLDER": str(folder)}
            settings |= {"HIVE_BENCH_MODEL": model_url, "LANGSMITH_TRACING": "false"}
            given = json.dumps(graphs).encode()
            found: list[float] = await _run("graph_peers.py", system, settings=settings, given=given)
            return found
        finally:
            postgres.stop()


def _database(postgres: EmbeddedPostgres) -> str:
    postgres.create_database("bench")
    return f"postgresql://hive:{quote(postgres.password)}@127.0.0.1:{postgres.port}/bench"


async def _run(script: str, *arguments: str, settings: dict[str, str], given: bytes = b"") -> Any:
    """Run a script in the peers' environment, and return the JSON that it prints."""
    python = interpreter()
    assert python is not None
    process = await asyncio.create_subprocess_exec(
        python,
        HERE / script,
        *arguments,
        env={**os.environ, **settings},
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        out, err = await asyncio.wait_for(process.communicate(given), TIMEOUT_S)
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        said = err.decode(errors="replace")[-2000:]
        raise RuntimeError(f"{script} {' '.join(arguments)}: exit code {process.returncode}\n{said}")
    return json.loads(out)


if __name__ == "__main__":
    install()
    model_peers.install()
    print(environment(), model_peers.environment())
