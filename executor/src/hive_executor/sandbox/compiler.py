"""Makes programs ready to run: checks them, compiles them once, and builds the shared CPython component."""

import asyncio
import hashlib
import os
import signal
import sys
import tempfile
from collections.abc import Awaitable, Callable
from importlib import resources
from importlib.metadata import version
from pathlib import Path, PurePosixPath
from typing import Final, TypeVar

import msgspec
from hive_common.kernel.errors import FailedPrecondition

from hive_executor.sandbox import model
from hive_executor.sandbox.cache import Compiled, CompiledCache
from hive_executor.sandbox.errors import InvalidModule
from hive_executor.sandbox.model import Program

COMPILE_S_MAX: Final = 180.0
BUILD_S_MAX: Final = 300.0
_GUEST_FILES: Final = (
    "_hive_bundle.py",
    "_hive_runtime.py",
    "_hive_sleep.py",
    "_hive_stdlib.py",
    "agent.wit",
    "hive.py",
)

_BUILD_SCRIPT: Final = (
    "from hive_executor.sandbox.confine import die_with_parent; die_with_parent(); "
    "from componentize_py import script; script()"
)

Progress = Callable[[str], None]
T = TypeVar("T")


# Names remembered per process; what is forgotten is only looked up again.
_REMEMBERED_MAX: Final = 4_096


class _Report(msgspec.Struct, frozen=True):
    error: str = ""
    image_bytes: int = 0


class Compiler:
    """Gives compiled modules, making those that are missing. Safe to use from several tasks and processes."""

    def __init__(self, cache_dir: Path, progress: Progress = lambda _: None) -> None:
        self._cache = CompiledCache(cache_dir)
        self._progress = progress
        self._ready: dict[str, Compiled] = {}
        self._checked: dict[str, None] = {}
        self._locks: dict[str, asyncio.Lock] = {}

    @property
    def code_dir(self) -> Path:
        """Return the folder with compiled modules."""
        return self._cache.code

    async def compiled(self, program: Program) -> Compiled:
        """Return what a runner loads for `program`.

        Raises:
            InvalidModule: it can never run.
            FailedPrecondition: the CPython component could not be built here.
        """
        name = "python" if program.runtime == "python" else f"{program.runtime}:{program.digest}"
        if program.runtime == "python" and program.digest not in self._checked:
            check_sources(program)
            _remember(self._checked, program.digest, None)
        if (found := self._ready.get(name)) is not None:
            return found
        async with self._locks.setdefault(name, asyncio.Lock()):
            if name not in self._ready:
                _remember(self._ready, name, await self._make(program))
            found = self._ready[name]
        self._locks.pop(name, None)
        return found

    async def python_if_cached(self) -> Compiled | None:
        """Return the CPython component if it needs no work."""
        found = await asyncio.to_thread(self._cache.find, self._python_key())
        if found is not None:
            self._ready["python"] = found
        return found

    def discard(self, program: Program) -> None:
        """Forget a compiled module that a runner could not load, so that it is compiled again."""
        name = "python" if program.runtime == "python" else f"{program.runtime}:{program.digest}"
        stale = self._ready.pop(name, None)
        if stale is not None:
            self._cache.discard(stale.path.stem)

    async def _make(self, program: Program) -> Compiled:
        if program.runtime == "python":
            return await self._cached(self._python_key(), "python", self._build_python)
        if program.module_path is None:
            raise InvalidModule(f"{program.entry}: a {program.runtime} needs a .wasm file")
        path = await asyncio.to_thread(program.module_path.absolute)
        digest = await asyncio.to_thread(_digest_of, path)

        async def fetched(_: Path) -> Path:
            return path

        return await self._cached(self._cache.key_of(digest, program.runtime), program.runtime, fetched)

    async def _cached(self, key: str, kind: str, source: Callable[[Path], Awaitable[Path]]) -> Compiled:
        async with self._cache.locked(key):
            found = await asyncio.to_thread(self._cache.find, key)
            if found is None:
                with tempfile.TemporaryDirectory(dir=self._cache.root, prefix="build-") as folder:
                    module = await source(Path(folder))
                    found = await self._compile(key, kind, module)
            return found

    async def _compile(self, key: str, kind: str, module: Path) -> Compiled:
        self._progress(f"compiling {module.name}")
        fresh = self._cache.scratch()
        try:
            command = (
                "-m",
                "hive_executor.sandbox.compile_child",
                kind,
                str(module),
                str(fresh),
            )
            with tempfile.TemporaryDirectory(dir=self._cache.root, prefix="build-") as empty:
                code, stdout, stderr = await _run_child(command, COMPILE_S_MAX, Path(empty))
            if code != 0:
                raise InvalidModule(f"{module.name}: the compiler {_ending(code)}: {stderr[-500:].strip()}")
            report = msgspec.json.decode(stdout, type=_Report)
            if report.error:
                raise InvalidModule(f"{module.name}: {report.error}")
            return await asyncio.to_thread(self._cache.admit, key, fresh, report.image_bytes)
        finally:
            fresh.unlink(missing_ok=True)

    def _python_key(self) -> str:
        content = hashlib.sha256(version("componentize-py").encode())
        for name, data in _guest_sources():
            content.update(f"\n{name} {len(data)}\n".encode() + data)
        return self._cache.key_of(content.hexdigest(), "python")

    async def _build_python(self, folder: Path) -> Path:
        self._progress("building the CPython component (once)")
        for name, data in _guest_sources():
            (folder / name).write_bytes(data)
        output = folder / "python.wasm"
        command: tuple[str, ...] = (
            "-c",
            "from componentize_py import script; script()",
            "-q",
            "-d",
            str(folder / "agent.wit"),
        )
        command += ("-w", "python-runtime", "componentize", "-p", str(folder), "_hive_runtime", "-o", str(output))
        code, _, stderr = await _run_child(command, BUILD_S_MAX, folder)
        if code != 0 or not output.exists():
            raise FailedPrecondition(f"componentize-py {_ending(code)}: {stderr[-2000:].strip()}")
        return output


def _remember(memory: dict[str, T], name: str, value: T) -> None:
    if len(memory) >= _REMEMBERED_MAX:
        del memory[next(iter(memory))]
    memory[name] = value


async def prepare(program: Program, cache_dir: Path) -> None:
    """Check `program` and compile it if needed, so that its first run is as fast as the next.

    Raises:
        InvalidModule: it can never run.
    """
    await Compiler(cache_dir).compiled(program)


async def prepare_python_runtime(cache_dir: Path, progress: Progress = lambda _: None) -> Path:
    """Build and compile the shared CPython component unless that was done before; return the compiled file.

    It takes some fifteen seconds once. Processes that ask at the same time wait for one of them.

    Raises:
        FailedPrecondition: componentize-py failed; the message carries its last words.
    """
    nothing = Program("python", "", "agent.py", {"agent.py": b""})
    return (await Compiler(cache_dir, progress).compiled(nothing)).path


def check_sources(program: Program) -> None:
    """Check the bounds and paths of a Python program.

    Raises:
        InvalidModule: too much, a path that is not plain, or no entry file.
    """
    files = program.files or {}
    if program.entry not in files:
        raise InvalidModule(
            f"{program.entry}: no such file in the agent; there are {', '.join(sorted(files)[:10])}"
        )
    if not program.entry.endswith(".py"):
        raise InvalidModule(f"{program.entry}: the entry of a python agent is a .py file")
    if len(files) > model.PROGRAM_FILES_MAX:
        raise InvalidModule(f"{len(files)} files; expected at most {model.PROGRAM_FILES_MAX}")
    total = sum(map(len, files.values()))
    if total > model.PROGRAM_BYTES_MAX:
        raise InvalidModule(f"{total} bytes of files; expected at most {model.PROGRAM_BYTES_MAX}")
    for name in files:
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or str(path) != name or "\0" in name or "\\" in name:
            raise InvalidModule(f"{name!r}: expected a plain relative path such as lib/text.py")


def _guest_sources() -> list[tuple[str, bytes]]:
    folder = resources.files("hive_executor.guest")
    return [(name, (folder / name).read_bytes()) for name in _GUEST_FILES]


def _digest_of(path: Path) -> str:
    try:
        size = path.stat().st_size
        if size > model.MODULE_BYTES_MAX:
            raise InvalidModule(f"{path.name}: {size} bytes; expected at most {model.MODULE_BYTES_MAX}")
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError:
        raise InvalidModule(f"{path}: no such file") from None


async def _run_child(command: tuple[str, ...], seconds: float, folder: Path) -> tuple[int, bytes, str]:
    """Run this Python with `command` in `folder`, without an environment; return exit code, stdout and stderr."""
    pipe = asyncio.subprocess.PIPE
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-P",
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=pipe,
        stderr=pipe,
        cwd=folder,
        env=child_environment(),
        start_new_session=True,
    )
    try:
        async with asyncio.timeout(seconds):
            stdout, stderr = await child.communicate()
    except TimeoutError:
        return -signal.SIGKILL, b"", f"still running after {seconds:.0f} s"
    finally:
        if child.returncode is None:
            os.killpg(child.pid, signal.SIGKILL)
            await child.wait()
    return child.returncode or 0, stdout, stderr.decode("utf-8", "replace")


def child_environment() -> dict[str, str]:
    """Return the whole environment of children: nothing of this process's, so no secret can be in it."""
    return {"LC_ALL": "C.UTF-8", "PYTHONDONTWRITEBYTECODE": "1", "PYTHONUNBUFFERED": "1"}


def _ending(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"failed with code {code}"
