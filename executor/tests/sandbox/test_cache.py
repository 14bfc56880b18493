import asyncio
import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
from hive_common.kernel.errors import FailedPrecondition
from hive_executor.sandbox import InvalidModule, Program, RunnerPool, cache, engine, prepare
from hive_executor.sandbox.cache import CompiledCache

from .conftest import limits

Module = Callable[[str], Program]


def compiled_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("code/*.cwasm"))


async def test_compiles_once_and_keeps_it_private(tmp_path: Path, module: Module) -> None:
    folder = tmp_path / "cache"
    await prepare(module("noop"), folder)
    (first,) = compiled_files(folder)
    written = first.stat().st_ino
    await prepare(module("noop"), folder)

    assert [path.stat().st_ino for path in compiled_files(folder)] == [written]
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((folder / "key").stat().st_mode) == 0o600
    assert not list(folder.glob("new-*")) + list(folder.glob("build-*"))


async def test_two_at_once_compile_once(tmp_path: Path, module: Module) -> None:
    await asyncio.gather(*(prepare(module("echo"), tmp_path / "cache") for _ in range(4)))
    assert len(compiled_files(tmp_path / "cache")) == 1


async def test_machine_code_that_was_not_compiled_here_is_never_loaded(tmp_path: Path, module: Module) -> None:
    folder = tmp_path / "cache"
    await prepare(module("noop"), folder)
    await prepare(module("not_json"), folder)
    # Swap the code of the two modules, as somebody would who can write files but does not know the key.
    first, second = compiled_files(folder)
    first_code, second_code = first.read_bytes(), second.read_bytes()
    first.write_bytes(second_code)
    second.write_bytes(first_code)

    assert await _run(folder, module("noop")) == b"{}"
    assert await _run(folder, module("not_json")) is None


async def _run(folder: Path, program: Program) -> bytes | None:
    pool = RunnerPool(size=1, cache_dir=folder)
    await pool.start()
    try:
        return (await pool.run(program, b"{}", limits())).output
    finally:
        await pool.close()


async def test_code_that_this_engine_cannot_load_is_compiled_again(tmp_path: Path, module: Module) -> None:
    folder = tmp_path / "cache"
    await prepare(module("noop"), folder)
    (path,) = compiled_files(folder)
    scratch = tmp_path / "other"
    scratch.write_bytes(b"\x7fELF code of another processor")
    CompiledCache(folder).admit(path.stem, scratch, 0)

    assert await _run(folder, module("noop")) == b"{}"


async def test_what_was_unused_for_longest_goes_when_the_cache_is_full(
    tmp_path: Path, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "cache"
    for name in ("noop", "echo"):
        await prepare(module(name), folder)
    noop, echo = sorted(compiled_files(folder), key=lambda path: path.stat().st_mtime)
    os.utime(noop, (2_000_000_000, 2_000_000_000))
    monkeypatch.setattr(cache, "CACHE_BYTES_MAX", noop.stat().st_size + 2 * echo.stat().st_size - 1)

    await prepare(module("not_json"), folder)

    assert noop.exists()
    assert not echo.exists()
    assert len(compiled_files(folder)) == 2


async def test_refused_modules_leave_nothing(tmp_path: Path, module: Module) -> None:
    with pytest.raises(InvalidModule, match=r"env\.secret"):
        await prepare(module("foreign_import"), tmp_path / "cache")
    assert compiled_files(tmp_path / "cache") == []
    assert not list((tmp_path / "cache").glob("new-*"))


async def test_too_large_module_is_not_even_read(tmp_path: Path) -> None:
    path = tmp_path / "big.wasm"
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(InvalidModule, match="bytes"):
        await prepare(Program("command", "test:big", "big.wasm", module_path=path), tmp_path / "cache")


def test_folder_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = os.geteuid() + 1
    monkeypatch.setattr(os, "geteuid", lambda: other)
    with pytest.raises(FailedPrecondition, match="belongs to user"):
        CompiledCache(tmp_path / "cache")


def test_an_old_engine_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(engine, "engine_version", lambda: "50.0.0")
    with pytest.raises(RuntimeError, match=r"50\.0\.1"):
        RunnerPool(size=1, cache_dir=tmp_path)


def test_engine_version_is_part_of_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = engine.fingerprint()
    monkeypatch.setattr(engine, "engine_version", lambda: "99.0.0")
    assert engine.fingerprint() != before
