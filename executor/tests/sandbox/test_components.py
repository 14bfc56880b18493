from collections.abc import Callable
from pathlib import Path

from hive_executor.sandbox import Program, RunnerPool

from .conftest import limits

Module = Callable[[str], Program]


async def test_component_gets_its_input_logs_and_answers(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("echo_component"), b'{"n": [1, 2]}', limits())
    assert (outcome.status, outcome.output) == ("succeeded", b'{"n": [1, 2]}'), outcome
    assert [(line.level, line.text) for line in outcome.log] == [("warning", '{"n": [1, 2]}')]


async def test_error_of_a_component_is_an_agent_error(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("error_component"), b'"sorry"', limits())
    assert (outcome.status, outcome.code, outcome.message) == ("failed", "agent_error", '"sorry"')


async def test_component_answer_that_is_not_json(pool: RunnerPool, module: Module) -> None:
    outcome = await pool.run(module("echo_component"), b"hello", limits())
    assert outcome.code == "invalid_output"


async def test_component_without_run_is_invalid(pool: RunnerPool, tmp_path: Path) -> None:
    path = tmp_path / "empty.wasm"
    import wasmtime

    path.write_bytes(wasmtime.wat2wasm("(component)"))
    outcome = await pool.run(Program("component", "test:empty", "empty.wasm", module_path=path), b"{}", limits())
    assert outcome.code == "invalid_module"
    assert "`run`" in outcome.message


async def test_core_module_is_no_component_and_the_reverse(pool: RunnerPool, module: Module) -> None:
    for name, runtime in (("noop", "component"), ("echo_component", "command")):
        path = module(name).module_path
        program = Program(runtime, f"test:swapped-{name}", f"{name}.wasm", module_path=path)
        assert (await pool.run(program, b"{}", limits())).code == "invalid_module"
