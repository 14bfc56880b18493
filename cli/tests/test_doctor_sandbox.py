"""What `hive doctor` says of the layers around the engine; the executor alone knows which there are."""

import json
import subprocess

import pytest
from hive_cli.commands import doctor
from hive_executor.sandbox.confine import LAYERS


def answer(monkeypatch: pytest.MonkeyPatch, missing: dict[str, str]) -> None:
    report = [{"name": name, "has": name not in missing, "fix": missing.get(name, "")} for name in LAYERS]
    done = subprocess.CompletedProcess([], 0, stdout=json.dumps(report), stderr="")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: done)


def test_every_layer_is_either_around_the_engine_or_named_as_missing() -> None:
    text = doctor._sandbox().text
    around, _, missing = text.partition("; this system gives runners no ")
    named = around.removeprefix("around the engine: ").split(", ") + (missing.split(", no ") if missing else [])
    assert sorted(named) == sorted(LAYERS)


def test_a_missing_layer_is_a_warning_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {"cgroup limits": "delegate a cgroup"})
    found = doctor._sandbox()
    assert (found.verdict, found.fix) == ("warn", "delegate a cgroup")
    assert found.text.startswith("around the engine: namespaces, ")
    assert found.text.endswith("; this system gives runners no cgroup limits")


def test_no_layer_at_all_is_said_plainly_and_each_fix_once(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, dict.fromkeys(LAYERS, "take Linux"))
    found = doctor._sandbox()
    assert found.fix == "take Linux"
    assert found.text.startswith(
        "around the engine: limits of a process; this system gives runners no namespaces, no "
    )


def test_all_layers_are_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    answer(monkeypatch, {})
    assert doctor._sandbox() == doctor.Finding("sandbox", "ok", "around the engine: " + ", ".join(LAYERS))
