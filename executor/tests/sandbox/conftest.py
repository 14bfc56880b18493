from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import wasmtime
from hive_executor.sandbox import Limits, Program, RunnerPool, prepare_python_runtime
from hive_executor.sandbox.warm import default_cache_dir

GUESTS = Path(__file__).parents[1] / "guests"
MIB = 1 << 20


def limits(wall_ms: int = 20_000, memory_bytes: int = 64 * MIB, fuel: int = 1 << 40, **more: int) -> Limits:
    """Generous limits, so that a test meets only the one it names."""
    return Limits(wall_ms, memory_bytes, fuel, **more)


def python(source: str, siblings: dict[str, str | bytes] | None = None) -> Program:
    """An agent with `source` as agent.py, and other files beside it."""
    contents = {"agent.py": source, **(siblings or {})}
    files = {path: data.encode() if isinstance(data, str) else data for path, data in contents.items()}
    return Program("python", f"test:{hash(tuple(files.items()))}", "agent.py", files)


@pytest.fixture(scope="session")
def module(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Program]:
    """Make a program of a text module in `tests/guests`, with something in it replaced where that is given."""
    folder = tmp_path_factory.mktemp("modules")

    def program(name: str, old: str = "", new: str = "") -> Program:
        text = (GUESTS / f"{name}.wat").read_text()
        if old:
            assert text.count(old) == 1, old
            text, name = text.replace(old, new), f"{name}-{new}"
        path = folder / f"{name}.wasm"
        path.write_bytes(wasmtime.wat2wasm(text))
        runtime = "component" if name.endswith("_component") else "command"
        return Program(runtime, f"test:{name}", f"{name}.wasm", module_path=path)

    return program


@pytest.fixture(scope="session")
def cache_dir() -> Path:
    """The cache of this user, because the CPython component takes a quarter of a minute to build."""
    return default_cache_dir()


@pytest.fixture
async def pool(cache_dir: Path) -> AsyncIterator[RunnerPool]:
    await prepare_python_runtime(cache_dir)
    pool = RunnerPool(size=1, cache_dir=cache_dir)
    await pool.start()
    yield pool
    await pool.close()


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave runners the time to end guests themselves, however slow the machine is: none is killed for that."""
    monkeypatch.setattr("hive_executor.sandbox.pool.KILL_SLACK_S", 60.0)
