from collections.abc import Callable
from pathlib import Path

import pytest
from hive_executor.sandbox import Program, RunnerPool, shown

from .conftest import MIB, limits

Module = Callable[..., Program]


async def test_noop_answers(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("noop"), b"{}", limits())
    assert (outcome.status, outcome.output, outcome.code) == ("succeeded", b"{}", None)
    assert 0 < outcome.fuel_used < 100
    assert outcome.memory_peak_bytes == 65536


@pytest.mark.parametrize("size", [0, 10, 1_000, 3_000_000])
async def test_input_arrives_on_stdin_and_output_leaves_unchanged(
    pool: RunnerPool, module: Module, size: int
) -> None:
    document = b'{ "x" :  "' + b"y" * size + b'"}\n'
    outcome = await pool.run(module("echo"), document, limits())
    assert outcome.output == document


@pytest.mark.parametrize("name", ["loop", "br_table_loop"])
@pytest.mark.usefixtures("patient")
async def test_loops_end_with_timeout(pool: RunnerPool, module: Module, name: str) -> None:
    outcome = await pool.run(module(name), b"{}", limits(wall_ms=100))
    assert outcome.code == "timeout"
    assert pool.stats()["restarts"] == 0


@pytest.mark.parametrize("name", ["loop", "br_table_loop"])
async def test_loops_end_with_fuel(pool: RunnerPool, module: Module, name: str) -> None:
    outcome = await pool.run(module(name), b"{}", limits(fuel=1_000_000))
    assert outcome.code == "fuel_exhausted"


async def test_memory_growth_up_to_the_limit(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("grow"), b"{}", limits(memory_bytes=8 * MIB))
    assert outcome.code == "memory_exceeded"
    assert outcome.memory_peak_bytes == 8 * MIB


async def test_module_that_starts_over_its_limit(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("born_large"), b"{}", limits(memory_bytes=8 * MIB))
    assert outcome.code == "memory_exceeded"


async def test_tables_are_bounded_too(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("table_grow"), b"{}", limits())
    assert outcome.status == "succeeded", outcome


async def test_stdout_flood_ends_with_output_exceeded(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("flood"), b"{}", limits(output_bytes=1_000_000))
    assert outcome.code == "output_exceeded"
    assert outcome.output is None


async def test_very_many_one_byte_writes_are_bounded(pool: RunnerPool, module: Module) -> None:
    program = module("million_writes", "1000000", "100000")
    outcome = await pool.run(program, b"{}", limits(wall_ms=60_000, log_bytes=10_000))
    assert outcome.status == "succeeded"
    assert outcome.log_truncated
    assert len(outcome.log) <= 10_000 // 32


async def test_recursion_traps(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("recurse"), b"{}", limits())
    assert outcome.code == "trap"
    assert "stack" in outcome.message
    assert pool.stats()["restarts"] == 0


async def test_sleeping_in_the_host_is_killed(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("sleep_hour"), b"{}", limits(wall_ms=1_000))
    assert outcome.code == "timeout"
    assert (await pool.run(module("noop"), b"{}", limits())).status == "succeeded"
    assert pool.stats()["restarts"] == 1


async def test_exit_code_is_an_error_with_the_end_of_stderr(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("exit_three"), b"{}", limits())
    assert outcome.code == "agent_error"
    assert "code 3" in outcome.message
    assert "no such thing" in outcome.detail
    assert [line.text for line in outcome.log] == ["first line", "no such thing: \x1b[31mx"]
    assert shown(outcome.log[1].text) == "no such thing: \ufffd[31mx"


async def test_not_json_is_invalid_output(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("not_json"), b"{}", limits())
    assert outcome.code == "invalid_output"
    assert "hello" in outcome.message


async def test_no_environment_no_arguments_no_directories(
    pool: RunnerPool, module: Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HIVE_SECRET", "do-not-leak")
    outcome = await pool.run(module("ambient"), b"{}", limits())
    assert outcome.output == b"[0,0,8]"


async def test_foreign_imports_are_invalid(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("foreign_import"), b"{}", limits())
    assert outcome.code == "invalid_module"
    assert "env.secret" in outcome.message


async def test_vector_exports_do_no_harm(pool: RunnerPool, module: Module) -> None:
    assert (await pool.run(module("vector_export"), b"{}", limits())).output == b"{}"
    assert (await pool.run(module("vector_start"), b"{}", limits())).code == "invalid_module"
    assert pool.stats()["restarts"] == 0


@pytest.mark.parametrize("content", [b"", b"not wasm at all", b"\0asm\x01\0\0\0\x01\xff\xff"])
async def test_what_is_not_wasm_is_invalid(pool: RunnerPool, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.wasm"
    path.write_bytes(content)
    outcome = await pool.run(Program("command", f"test:{content!r}", "bad.wasm", module_path=path), b"{}", limits())
    assert outcome.code == "invalid_module"


async def test_truncated_module_is_invalid(pool: RunnerPool, module: Module, tmp_path: Path) -> None:
    whole = module("echo").module_path
    assert whole is not None
    path = tmp_path / "cut.wasm"
    path.write_bytes(whole.read_bytes()[:-20])
    outcome = await pool.run(Program("command", "test:cut", "cut.wasm", module_path=path), b"{}", limits())
    assert outcome.code == "invalid_module"
    assert "cut.wasm" in outcome.message


async def test_missing_file_is_invalid(pool: RunnerPool, tmp_path: Path) -> None:
    program = Program("command", "test:missing", "m.wasm", module_path=tmp_path / "m.wasm")
    assert (await pool.run(program, b"{}", limits())).code == "invalid_module"
