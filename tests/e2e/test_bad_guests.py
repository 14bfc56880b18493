"""Guests that misbehave, through the whole installation: each ends with its named code, and work goes on."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import wasmtime
from hive_common.testing.installation import Installation, assert_exactly_once

GUESTS = Path(__file__).resolve().parents[2] / "executor" / "tests" / "guests"
LOOP = "while True:\n        pass"
GROW = "hoard = []\n    while True:\n        hoard.append(bytearray(1 << 20))"
RECURSE = "return run(input)"
RAISE = "raise ValueError('on purpose')"
NOT_JSON = "return {'when': {1, 2}}"

PYTHON = {
    "loop": (LOOP, {"timeout": "1s"}, "timeout"),
    "fuel": (LOOP, {"timeout": "30s", "fuel": 100_000_000}, "fuel_exhausted"),
    "grow": (GROW, {"memory": "64Mi", "timeout": "30s"}, "memory_exceeded"),
    "recurse": (RECURSE, {}, "agent_error"),
    "raise": (RAISE, {}, "agent_error"),
    "set": (NOT_JSON, {}, "invalid_output"),
}
COMMANDS = {
    "flood": "output_exceeded",
    "recurse": "trap",
    "not_json": "invalid_output",
}


def publish(installation: Installation, folder: Path, manifest: dict[str, object]) -> Path:
    """Publish an agent and return a job that runs it once."""
    document = {"apiVersion": "hive/v1", "kind": "Agent", "version": "1.0.0", **manifest}
    (folder / "manifest.yaml").write_text(json.dumps(document))
    installation.hive("agent", "push", str(folder))
    job = {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": manifest["name"],
        "tasks": [{"id": "bad", "agent": f"{manifest['name']}@1.0.0", "input": {}}],
    }
    file = folder / "job.yaml"
    file.write_text(json.dumps(job))
    return file


def code_of(installation: Installation, job: Path) -> tuple[str, str]:
    """Run a job to its end and return code and message of its only attempt."""
    done = installation.hive("run", str(job), "--json", check=False)
    result = json.loads(done.stdout)
    assert (done.returncode, result["state"], result["attempts"]) == (1, "failed", 1)
    events = installation.events(result["job_id"])
    assert_exactly_once(events)
    (failed,) = [event["data"] for event in events if event["type"] == "AttemptFailed"]
    return failed["code"], json.dumps(failed)


@pytest.fixture(scope="module")
def unharmed(hive_home: Installation, squares: Path) -> Iterator[None]:
    """Check afterwards that every process is the one it was, and that work goes on."""
    before = hive_home.pids()
    yield
    assert hive_home.json("run", str(squares), "--input", "numbers=[3]")["output"] == {"total": 9}
    assert hive_home.pids() == before


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", PYTHON)
def test_a_python_agent_that(name: str, hive_home: Installation, tmp_path: Path) -> None:
    body, resources, expected = PYTHON[name]
    (tmp_path / "agent.py").write_text(f"def run(input: dict) -> dict:\n    {body}\n")
    manifest = {"name": f"bad-{name}", "runtime": "python", "entry": "agent.py", "resources": resources}
    code, told = code_of(hive_home, publish(hive_home, tmp_path, manifest))
    assert code == expected, told
    if name == "raise":
        assert "on purpose" in told
        assert "agent.py" in told
        assert "line 2" in told


@pytest.mark.usefixtures("unharmed")
@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_that(name: str, hive_home: Installation, tmp_path: Path) -> None:
    (tmp_path / "bad.wasm").write_bytes(wasmtime.wat2wasm((GUESTS / f"{name}.wat").read_text()))
    manifest = {"name": f"bad-{name.replace('_', '-')}-command", "runtime": "command", "entry": "bad.wasm"}
    code, told = code_of(hive_home, publish(hive_home, tmp_path, manifest))
    assert code == COMMANDS[name], told
