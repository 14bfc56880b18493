"""How `hive pain` shows failures, and what it asks for."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hive_cli.commands import pain
from hive_cli.main import app
from typer.testing import CliRunner

GROUP = {
    "fingerprint": "0123456789abcdef",
    "agent": "solver",
    "code": "agent_error",
    "message": "KeyError: <value>\u202e[bold]",
    "failures": 1_200,
    "jobs": 3,
    "agents": ["solver@1.0.0"],
    "executors": ["e1"],
    "executor_count": 4,
    "first_us": 1_700_000_000_000_000,
    "last_us": 1_800_000_000_000_000,
    "wall_ms": 65_000,
    "model_calls": 7,
    "tokens": 5_000,
    "nano_usd": 1_250_000_000,
}
EXAMPLE = {
    "job_id": "job-1",
    "task_id": "task-1",
    "step": "answer",
    "attempt": 2,
    "agent": "solver@1.0.0",
    "executor": "e1",
    "message": "KeyError: 'a'",
    "input_digest": "sha256:00",
    "at_us": 1_800_000_000_000_000,
    "position": 9,
    "wall_ms": 5,
}


class Api:
    """A gateway with one group of failures."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.groups = [GROUP]

    def get(self, path: str, **params: Any) -> Any:
        self.asked.append((path, params))
        if path == "/v1/pain":
            return {"groups": self.groups, "position": 9, "truncated": True}
        return {"group": GROUP, "examples": [EXAMPLE, {**EXAMPLE, "attempt": None, "input_digest": ""}]}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    gateway = Api()

    @contextmanager
    def connect(home: Any) -> Iterator[Api]:
        yield gateway

    monkeypatch.setattr(pain, "connect", connect)
    return gateway


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["pain", *arguments])


def test_groups_are_listed_with_what_they_cost(api):
    found = run("--agent", "solver", "--since", "2026-11-26", "--limit", "5")
    assert found.exit_code == 0, found.output
    for text in ("0123456789abcdef", "1,200", "solver", "agent_error", "65.0 s", "5,000", "1.25", "[bold]"):
        assert text in found.output, found.output
    assert "\u202e" not in found.output and "the newest" in found.output
    assert api.asked == [("/v1/pain", {"since_us": 1_795_651_200_000_000, "agent": "solver", "limit": 5})]
    api.groups = []
    assert "nothing has failed" in run().output
    assert api.asked[-1][1]["since_us"] == 0
    assert json.loads(run("--json").output)["position"] == 9


def test_one_group_is_shown_with_examples_and_the_commands_to_look_at_them(api):
    found = run("show", "0123", "--examples", "2", "--since", "24h")
    assert found.exit_code == 0, found.output
    for text in (
        "solver: agent_error: KeyError: <value>",
        "1,200 in 3 jobs",
        "e1 and 3 more",
        "65.0 s, 7 model calls, 5,000 tokens",
        "attempt 2",
        "without an attempt",
        "KeyError: 'a'",
        "input sha256:00",
        "input not known",
        "hive job explain task-1",
        "hive job logs job-1 --task task-1",
    ):
        assert text in found.output, (text, found.output)
    path, params = api.asked[0]
    assert (path, params["examples"]) == ("/v1/pain/0123", 2) and params["since_us"] > 1_700_000_000_000_000
    assert json.loads(run("show", "0123", "--json").output)["group"]["failures"] == 1_200


@pytest.mark.parametrize(
    "arguments", [("--since", "soon"), ("--since", "2026-13-01"), ("show", "xyz"), ("show", "012")]
)
def test_bad_input_is_refused(api, arguments):
    found = run(*arguments)
    assert found.exit_code != 0 and not api.asked
