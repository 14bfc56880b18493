"""Guests that mean harm: each ends with its named code, in time, and leaves nothing.

`make hostile` runs all of it; `make test` a short part with the same seed.
"""

import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import NamedTuple

import psutil
import pytest
import wasmtime
from hive_executor.sandbox import Limits, Outcome, Program, RunnerPool, prepare, shown
from hive_executor.sandbox.errors import InvalidModule

from .conftest import MIB, limits, python

Module = Callable[[str], Program]

SEED = int(os.environ.get("HIVE_HOSTILE_SEED", "20261125"))
FULL = os.environ.get("HIVE_HOSTILE") == "full"
PROMISE_MS = 250
"""How long after its limit an attempt may end."""
SLACK_MS = 4 * PROMISE_MS + (0 if FULL else 2_000)
"""How late it may end here: four times the promise, and in `make test` what a machine shared by many needs too."""
SMITH_MODULES = 300 if FULL else 12
BOMB_MEGABYTES = (1, 5, 10) if FULL else (1,)


class Ended(NamedTuple):
    """When an attempt ended, seen from the pool, the killing of its runner included."""

    name: str
    code: str | None
    limit_ms: int
    took_ms: float

    @property
    def late_ms(self) -> float:
        return self.took_ms - self.limit_ms


ENDED: list[Ended] = []


async def attempt(
    pool: RunnerPool, program: Program, bounds: Limits, input_: bytes = b"{}", *, name: str = ""
) -> Outcome:
    """Run a program that is compiled already, and see that it ends in time whatever it does."""
    started = time.monotonic()
    outcome = await pool.run(program, input_, bounds)
    ended = Ended(
        name or program.digest.removeprefix("test:"),
        outcome.code,
        bounds.wall_ms,
        (time.monotonic() - started) * 1000,
    )
    ENDED.append(ended)
    assert ended.late_ms <= SLACK_MS, outcome
    return outcome


@pytest.fixture
async def watched(pool: RunnerPool, cache_dir: Path) -> AsyncIterator[RunnerPool]:
    """A pool that must be as it was afterwards: as many processes, no file, no memory, and it works."""
    ours = psutil.Process()
    noop = python("def run(input):\n    return {}")
    await pool.run(noop, b"{}", limits())
    (folder_before, memory_before) = (_litter(cache_dir), ours.memory_full_info().uss)
    yield pool
    assert (await pool.run(noop, b"{}", limits())).output == b"{}"
    (pid,) = pool.stats()["pids"]
    assert psutil.Process(pid).children(recursive=True) == []
    runners = [child for child in ours.children(recursive=True) if _is_runner(child)]
    assert [child.pid for child in runners] == [pid]
    assert psutil.Process(pid).memory_full_info().uss < 100 * MIB
    assert ours.memory_full_info().uss < memory_before + 64 * MIB
    assert _litter(cache_dir) <= folder_before
    assert list((cache_dir / "empty").iterdir()) == []


def _litter(cache_dir: Path) -> set[str]:
    # Other processes may use this cache too, but what they drop is gone again soon.
    return {str(path) for path in (cache_dir / "code").iterdir() if path.suffix != ".cwasm"}


def _is_runner(process: psutil.Process) -> bool:
    try:
        return "hive_executor.sandbox.runner" in process.cmdline()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


# Those that `test_commands.py` does not have.
COMMANDS = [
    ("random_and_clock", "timeout", limits(wall_ms=200)),
    ("large_random", "timeout", limits(wall_ms=200)),
    ("random_and_clock", "fuel_exhausted", limits(fuel=10_000)),
    ("reentry_component", "trap", limits()),
    ("wild_pointers", "trap", limits()),
    ("paths", None, limits()),
    ("sleep_hour", "timeout", limits(wall_ms=200)),
]
ALL_COMMANDS = [
    *COMMANDS,
    ("loop", "timeout", limits(wall_ms=200)),
    ("br_table_loop", "timeout", limits(wall_ms=200)),
    ("grow", "memory_exceeded", limits(memory_bytes=8 * MIB)),
    ("born_large", "memory_exceeded", limits(memory_bytes=8 * MIB)),
    ("flood", "output_exceeded", limits(output_bytes=100_000)),
    ("recurse", "trap", limits()),
    ("vector_start", "invalid_module", limits()),
    ("foreign_import", "invalid_module", limits()),
    ("table_grow", None, limits()),
    ("vector_export", None, limits()),
]


@pytest.mark.parametrize(("name", "code", "bounds"), ALL_COMMANDS if FULL else COMMANDS)
async def test_each_ends_with_its_code(
    watched: RunnerPool, module: Module, cache_dir: Path, name: str, code: str | None, bounds: Limits
) -> None:
    program = module(name)
    if code != "invalid_module":
        await prepare(program, cache_dir)
    outcome = await attempt(watched, program, bounds)
    assert outcome.code == code, outcome
    assert outcome.output == (None if code else b"{}")


PYTHON_GUESTS = {
    "cycles": (
        "memory_exceeded",
        "def run(input):\n    kept = []\n    while True:\n        a = [bytes(1000)]\n        a.append(a)\n"
        "        kept.append(a)\n",
    ),
    "collector": (
        "timeout",
        "import gc\ndef run(input):\n    kept = [[] for _ in range(100000)]\n    while True:\n"
        "        a = [kept]\n        a.append(a)\n        del a\n        gc.collect()\n",
    ),
    "one large object": ("memory_exceeded", "def run(input):\n    return len(bytes(1 << 30))\n"),
    "large number": (
        "timeout",
        "def run(input):\n    n = 3\n    while True:\n        n = n * n % (1 << 4000000)\n",
    ),
    "recursion": ("agent_error", "def run(input):\n    return run(input)\n"),
    "log flood": ("timeout", "def run(input):\n    while True:\n        print('x' * 1000)\n"),
    "deep output": (
        "trap",
        "def run(input):\n    x = []\n    for _ in range(200000):\n        x = [x]\n    return x\n",
    ),
}


@pytest.mark.parametrize("name", PYTHON_GUESTS if FULL else ["cycles", "collector", "recursion"])
async def test_python_agents_end_with_their_code(watched: RunnerPool, name: str) -> None:
    code, source = PYTHON_GUESTS[name]
    bounds = limits(wall_ms=10_000 if code != "timeout" else 1_000, memory_bytes=32 * MIB)
    outcome = await attempt(watched, python(source), bounds, name=f"python: {name}")
    assert outcome.code == code, outcome
    assert len(outcome.log) <= MIB // 32


async def test_log_lines_cannot_steer_a_terminal(watched: RunnerPool, module: Module) -> None:
    outcome = await attempt(watched, module("terminal"), limits())
    (line,) = outcome.log
    assert "\x1b]0;owned" in line.text
    assert not set(shown(line.text)) & set("\x1b\x07\r\x9b\u202e\x00")
    assert "evil" in shown(line.text)


def wasm_of(text: str, folder: Path, name: str) -> Program:
    path = folder / f"{name}.wasm"
    path.write_bytes(wasmtime.wat2wasm(text))
    runtime = "component" if text.startswith("(component") else "command"
    return Program(runtime, f"test:{name}", path.name, module_path=path)


async def test_a_hundred_memories_in_a_module_are_invalid(watched: RunnerPool, tmp_path: Path) -> None:
    text = f'(module {"(memory 1) " * 100} (func (export "_start")))'
    outcome = await attempt(watched, wasm_of(text, tmp_path, "memories"), limits())
    assert outcome.code == "invalid_module"


async def test_a_hundred_memories_in_a_component_are_refused(watched: RunnerPool, tmp_path: Path) -> None:
    text = (
        '(component (core module $m (memory (export "memory") 100)'
        ' (func (export "realloc") (param i32 i32 i32 i32) (result i32) (i32.const 1024))'
        ' (func (export "run") (param i32 i32) (result i32) (i32.const 0)))'
        + "".join(f"(core instance $i{n} (instantiate $m))" for n in range(100))
        + '(alias core export $i0 "memory" (core memory $memory)) (alias core export $i0 "realloc" (core func $r))'
        ' (func (export "run") (param "input" string) (result (result string (error string)))'
        ' (canon lift (core func $i0 "run") (memory $memory) (realloc $r))))'
    )
    outcome = await attempt(watched, wasm_of(text, tmp_path, "memories_component"), limits())
    assert outcome.code == "invalid_module", outcome


async def test_objects_of_the_gc_proposal_are_invalid(watched: RunnerPool, tmp_path: Path) -> None:
    text = (
        "(module (type $list (struct (field (ref null $list))))"
        ' (func (export "_start") (local $l (ref null $list))'
        " (loop $more (local.set $l (struct.new $list (local.get $l))) (br $more))))"
    )
    outcome = await attempt(watched, wasm_of(text, tmp_path, "gc"), limits())
    assert outcome.code == "invalid_module"


REACHES_OUT = """
import os
ATTEMPTS = {
    "absolute": lambda: open("/etc/passwd").read(),
    "upwards": lambda: open("../../../../etc/passwd").read(),
    "through a device": lambda: open("/proc/self/root/etc/passwd").read(),
    "symlink": lambda: (os.symlink("/etc", "etc"), open("etc/passwd").read()),
    "symlink upwards": lambda: (os.symlink("../../..", "up"), os.listdir("up")),
    "hard link": lambda: os.link("/etc/passwd", "passwd"),
    "rename": lambda: os.rename("/etc/passwd", "passwd"),
    "folder": lambda: os.mkdir("/new"),
    "list": lambda: os.listdir("/"),
    "list here": lambda: os.listdir("."),
    "write": lambda: open("/tmp/new", "w").write("x"),
    "descriptor": lambda: os.open("..", os.O_RDONLY, dir_fd=3),
}
def run(input):
    found = {}
    for name, reach in ATTEMPTS.items():
        try:
            found[name] = f"WORKED: {reach()!r}"[:200]
        except Exception as error:
            found[name] = type(error).__name__
    return found
"""


async def test_an_agent_reaches_no_file_by_any_path_or_link(watched: RunnerPool) -> None:
    outcome = await attempt(watched, python(REACHES_OUT), limits(), name="python: paths and links")
    found = json.loads(outcome.output or b"{}")
    assert len(found) == 12, outcome
    assert {name: what for name, what in found.items() if "Error" not in what or "WORKED" in what} == {}


@pytest.mark.parametrize("name", ["../../etc/passwd", "/etc/passwd", "lib/../../x.py", "a\\..\\b.py", "x\0.py"])
async def test_sources_with_paths_that_lead_out_are_invalid(watched: RunnerPool, name: str) -> None:
    program = python("def run(input):\n    return 1", {name: b"x = 1"})
    outcome = await attempt(watched, program, limits(), name=f"python: source {name!r}")
    assert outcome.code == "invalid_module"


async def test_a_million_one_byte_writes_end_in_time(watched: RunnerPool, module: Module, cache_dir: Path) -> None:
    program = module("million_writes")
    await prepare(program, cache_dir)
    outcome = await attempt(watched, program, limits(wall_ms=500, log_bytes=10_000))
    assert outcome.code in {None, "timeout"}  # a fast machine is through by then
    assert len(outcome.log) <= 10_000 // 32


DAMAGED = 100 if FULL else 12


@pytest.mark.timeout(1_200)
@pytest.mark.parametrize("name", ["echo", "echo_component"])
async def test_damaged_modules_end_with_a_named_code(
    watched: RunnerPool, module: Module, cache_dir: Path, tmp_path: Path, name: str
) -> None:
    rng = random.Random(SEED)
    whole = module(name).module_path
    assert whole is not None
    data = whole.read_bytes()
    codes: dict[str | None, int] = {}
    for number in range(DAMAGED):
        damaged = bytearray(data)
        if number % 2:
            del damaged[rng.randrange(len(data)) :]
        else:
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path = tmp_path / f"damaged-{number}.wasm"
        path.write_bytes(damaged)
        program = Program(module(name).runtime, f"test:damaged-{name}-{number}", path.name, module_path=path)
        if await compiles(program, cache_dir):
            outcome = await attempt(watched, program, limits(wall_ms=300, memory_bytes=16 * MIB, fuel=1_000_000))
            code = outcome.code
        else:
            code = "invalid_module"
        codes[code] = codes.get(code, 0) + 1
    print(f"damaged {name}: seed {SEED}, {DAMAGED} modules: {codes}")
    assert "runner_died" not in codes
    assert codes["invalid_module"] >= DAMAGED // 2, "every truncated one"


def bomb(bytes_wanted: int) -> bytes:
    """Return a module of about that size whose functions cost the optimiser much: long chains of live values."""
    body = bytearray()
    body += b"\x01\x20\x7e"  # 32 locals of i64
    for step in range(400):
        # local[b] = (local[a] * local[b]) rotl local[c] + local[d]; with a branch that keeps all of them alive
        a, b, c, d = step % 32, (step * 7 + 1) % 32, (step * 13 + 2) % 32, (step * 29 + 3) % 32
        body += bytes((0x20, a, 0x20, b, 0x7E, 0x20, c, 0x89, 0x20, d, 0x7C, 0x21, b))
        body += bytes((0x20, b, 0x50, 0x04, 0x40, 0x20, a, 0x21, c, 0x0B))
    body += b"\x0b"
    count = max(bytes_wanted // (len(body) + 3), 1)
    code = b"".join(_leb(len(body)) + bytes(body) for _ in range(count))
    sections = (
        (1, b"\x01\x60\x00\x00"),
        (3, _leb(count) + bytes(count)),
        (7, b"\x01\x06_start\x00\x00"),
        (10, _leb(count) + code),
    )
    return b"\0asm\x01\0\0\0" + b"".join(bytes((kind,)) + _leb(len(data)) + data for kind, data in sections)


def _leb(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("megabytes", BOMB_MEGABYTES)
async def test_compile_bombs_end_within_the_limits_of_the_child(tmp_path: Path, megabytes: int) -> None:
    path = tmp_path / "bomb.wasm"
    path.write_bytes(bomb(megabytes * 1_000_000))
    cache = tmp_path / "cache"
    compiling = asyncio.create_task(prepare(Program("command", "test:bomb", path.name, module_path=path), cache))
    peak = 0
    while not compiling.done():
        peak = max(peak, sum(_resident(child) for child in psutil.Process().children(recursive=True)))
        await asyncio.sleep(0.05)
    error = compiling.exception()
    assert error is None or isinstance(error, InvalidModule), error
    assert peak < 2_300 * MIB
    assert not [path for path in cache.iterdir() if path.name.startswith(("new-", "build-"))]
    assert not [child for child in psutil.Process().children(recursive=True) if "compile_child" in str(child)]


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss if "hive_executor.sandbox.compile_child" in process.cmdline() else 0
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return 0


async def test_a_compile_that_is_cancelled_leaves_no_process_and_no_file(tmp_path: Path) -> None:
    path = tmp_path / "bomb.wasm"
    path.write_bytes(bomb(5_000_000))
    cache = tmp_path / "cache"
    compiling = asyncio.create_task(prepare(Program("command", "test:bomb", path.name, module_path=path), cache))
    async with asyncio.timeout(30):
        while not any(map(_resident, psutil.Process().children(recursive=True))):
            await asyncio.sleep(0.02)
    compiling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await compiling
    assert not any(map(_resident, psutil.Process().children(recursive=True)))
    assert not [path for path in cache.iterdir() if path.name.startswith(("new-", "build-"))]
    assert list((cache / "code").iterdir()) == []


# Proposals that the engine refuses, so that random modules get further than the parser.
PROPOSALS_OFF = (
    *("compact-imports", "custom-descriptors", "custom-page-sizes", "exceptions", "gc", "memory64"),
    *("reference-types", "relaxed-simd", "shared-everything-threads", "threads", "wide-arithmetic"),
)


def smith(seed: int, shape: Path, folder: Path) -> Path | None:
    """Return a random valid module with the imports and exports of a command; None for a seed that gives none."""
    tool = shutil.which("wasm-tools") or str(Path(sys.executable).with_name("wasm-tools"))
    path = folder / f"smith-{seed}.wasm"
    flags = [word for name in PROPOSALS_OFF for word in (f"--{name}-enabled", "false")]
    done = subprocess.run(
        [tool, "smith", "--exports", str(shape), "--max-imports", "0", "--min-funcs", "1", *flags, "-o", str(path)],
        input=random.Random(seed).randbytes(4_096),
        capture_output=True,
        timeout=60,
    )
    return path if done.returncode == 0 else None


async def compiles(program: Program, cache_dir: Path) -> bool:
    """Compile it ahead, so that no attempt waits for that."""
    try:
        await prepare(program, cache_dir)
    except InvalidModule:
        return False
    return True


@pytest.mark.timeout(1_200)
async def test_random_modules_end_with_a_named_code(watched: RunnerPool, cache_dir: Path, tmp_path: Path) -> None:
    shape = tmp_path / "shape.wasm"
    shape.write_bytes(wasmtime.wat2wasm('(module (func (export "_start")))'))
    codes: dict[str | None, int] = {}
    for number in range(SMITH_MODULES):
        seed = SEED + number
        path = await asyncio.to_thread(smith, seed, shape, tmp_path)
        if path is None:
            codes["no module"] = codes.get("no module", 0) + 1
            continue
        program = Program("command", f"test:smith-{seed}", path.name, module_path=path)
        if not await compiles(program, cache_dir):
            codes["invalid_module"] = codes.get("invalid_module", 0) + 1
            continue
        outcome = await attempt(watched, program, limits(wall_ms=300, memory_bytes=16 * MIB, fuel=100_000_000))
        codes[outcome.code] = codes.get(outcome.code, 0) + 1
        assert outcome.code != "runner_died", (seed, outcome)
    print(f"smith: seed {SEED}, {SMITH_MODULES} modules: {codes}")
    assert sum(codes.values()) == SMITH_MODULES
    assert set(codes) <= {
        "no module", "trap", "timeout", "fuel_exhausted", "memory_exceeded", "invalid_module", "invalid_output"
    }  # fmt: skip
    assert codes.get("no module", 0) < SMITH_MODULES // 2
    assert codes.get("invalid_module", 0) < SMITH_MODULES // 2


def test_attempts_that_met_their_limit_ended_soon_after_it() -> None:
    """What all attempts above took, as a table; last, so that it has them."""
    groups: dict[str, list[Ended]] = {}
    for ended in ENDED:
        name = ended.name.rstrip("0123456789-") if ended.name.startswith(("smith", "damaged")) else ended.name
        groups.setdefault(f"{name} → {ended.code or 'succeeded'}", []).append(ended)
    print(f"{'attempt':<52} {'count':>5} {'limit ms':>8} {'ended ms':>9} {'late ms, median':>15} {'max':>7}")
    for name, found in groups.items():
        met = [one.late_ms for one in found if one.code == "timeout"]
        late = (f"{statistics.median(met):.0f}", f"{max(met):.0f}") if met else ("", "")
        took = statistics.median(one.took_ms for one in found)
        print(f"{name:<52} {len(found):>5} {found[0].limit_ms:>8} {took:>9.0f} {late[0]:>15} {late[1]:>7}")
    met = [one.late_ms for one in ENDED if one.code == "timeout"]
    assert met, "no attempt met its limit of time"
    print(
        f"hostile: {len(ENDED)} attempts, {len(met)} met their limit of time and ended"
        f" {statistics.median(met):.0f} ms after it (median), {max(met):.0f} ms (max);"
        f" promised {PROMISE_MS} ms, allowed here {SLACK_MS} ms"
    )
    assert max(one.late_ms for one in ENDED) <= SLACK_MS
