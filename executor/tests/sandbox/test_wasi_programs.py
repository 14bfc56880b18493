"""WASI preview 1 programs, each with the specification in JSON that the public WASI test suite has beside its own.

The programs in `tests/guests/wasi` are ours. The suite's run when `HIVE_WASI_TESTSUITE` names a folder with them
(`make wasi-testsuite SUITE=...`); `tests/guests/README.md` says why they are not here.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import wasmtime
from hive_executor.sandbox import Outcome, Program, RunnerPool, prepare
from hive_executor.sandbox.errors import InvalidModule

from .conftest import GUESTS, limits

SUITE = os.environ.get("HIVE_WASI_TESTSUITE", "")


class Specification(msgspec.Struct):
    """What a program is given and must do; the defaults are those of the suite (its doc/specification.md)."""

    args: list[str] = []
    dirs: list[str] = []
    env: dict[str, str] = {}
    exit_code: int = 0
    stdout: str | None = None
    stderr: str | None = None

    @property
    def refused(self) -> str:
        """Why a sandbox that grants nothing cannot let it pass; empty when it can."""
        wanted = {"a folder": self.dirs, "environment variables": self.env, "arguments": self.args}
        return ", ".join(name for name, value in wanted.items() if value)


def specification(program: Path) -> Specification:
    file = program.with_suffix(".json")
    return msgspec.json.decode(file.read_bytes(), type=Specification) if file.exists() else Specification()


def problem(outcome: Outcome, wanted: Specification) -> str:
    """Say what is not as specified; empty when all is."""
    exited = {None: 0, "invalid_output": 0}.get(
        outcome.code
    )  # what is no JSON was written by a program that ended well
    if outcome.code == "agent_error" and "exited with code" in outcome.message:
        exited = int(outcome.message.rpartition(" ")[2])
    if exited != wanted.exit_code:
        return f"expected exit code {wanted.exit_code}: {outcome.code}: {outcome.message}"
    if wanted.stdout is not None and exited == 0:
        whole = outcome.output is not None and outcome.output.decode() == wanted.stdout
        if not whole and not outcome.message.endswith(f"it starts with {wanted.stdout[:80]!r}"):
            return f"expected {wanted.stdout!r} on stdout: {outcome.output!r} {outcome.message}"
    said = [line.text for line in outcome.log]
    if wanted.stderr is not None and said != wanted.stderr.splitlines():
        return f"expected {wanted.stderr!r} on stderr: {said}"
    return ""


def modules(folder: Path) -> Iterator[Path]:
    """Yield the programs of a folder of the suite that are of preview 1."""
    for path in sorted(folder.rglob("*.wasm")):
        is_core_module = path.read_bytes()[:8] == b"\0asm\x01\0\0\0"
        if is_core_module and not any(part.endswith(("wasip2", "wasip3")) for part in path.parts):
            yield path


async def run(pool: RunnerPool, path: Path, cache_dir: Path) -> Outcome:
    program = Program("command", f"test:wasi-{path}", path.name, module_path=path)
    await prepare(program, cache_dir)
    return await pool.run(program, b"", limits())


REFUSED_HERE = {
    "args-two": "arguments",
    "environ-two": "environment variables",
    "dir-create-file": "a folder, arguments",
}


async def test_each_program_does_what_its_specification_says(
    pool: RunnerPool, cache_dir: Path, tmp_path: Path
) -> None:
    problems = {}
    for source in sorted((GUESTS / "wasi").glob("*.wat")):
        path = tmp_path / f"{source.stem}.wasm"
        path.write_bytes(wasmtime.wat2wasm(source.read_text()))
        if found := problem(await run(pool, path, cache_dir), specification(source)):
            problems[source.stem] = found
    assert set(problems) == set(REFUSED_HERE), problems
    assert pool.stats()["restarts"] == 0


def test_every_program_that_is_refused_is_named_with_its_reason() -> None:
    found = {path.stem: specification(path).refused for path in (GUESTS / "wasi").glob("*.wat")}
    assert {name: reason for name, reason in found.items() if reason} == REFUSED_HERE


@pytest.mark.skipif(not SUITE, reason="the suite is in no package: make wasi-testsuite SUITE=/path/to/its/tests")
@pytest.mark.timeout(1_800)
async def test_programs_of_the_public_suite(pool: RunnerPool, cache_dir: Path) -> None:
    passed, refused, failed = [], [], []
    for path in modules(Path(SUITE)):
        wanted = specification(path)
        try:
            outcome = await run(pool, path, cache_dir)
        except InvalidModule as error:
            failed.append(f"{path.name}: {error.message}")
            continue
        assert outcome.code in {None, "invalid_output", "agent_error", "trap"}, (path, outcome)
        found = problem(outcome, wanted)
        if not found:
            passed.append(path.name)
        elif wanted.refused:
            refused.append(f"{path.name}: wants {wanted.refused}")
        else:
            failed.append(f"{path.name}: {found}")
    print(f"WASI test suite: {len(passed)} passed, {len(refused)} refused, {len(failed)} failed")
    print("\n".join(["refused, since a guest is granted nothing:", *refused, "failed:", *failed]))
    assert passed, f"{SUITE} has no programs of preview 1"
    assert failed == []
    assert pool.stats()["restarts"] == 0
