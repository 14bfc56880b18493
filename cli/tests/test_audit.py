"""How `hive audit verify --decision` says what came of it, and how it ends."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hive_cli.commands import audit
from hive_cli.main import app
from typer.testing import CliRunner


def check(result: str, *reasons: str, task: str = "task-1", position: int = 7) -> dict[str, Any]:
    return {
        "task_id": task,
        "job_id": "job-1",
        "step": "answer",
        "position": position,
        "outcome": "decided" if task else "joined",
        "result": result,
        "reasons": list(reasons),
    }


class Api:
    """A gateway with pages of checks."""

    def __init__(self) -> None:
        self.pages: list[list[dict[str, Any]]] = []
        self.asked: list[dict[str, Any]] = []

    def get(self, path: str, **params: Any) -> Any:
        assert path == "/v1/audit/decisions"
        self.asked.append(params)
        number = len(self.asked)
        return {"checks": self.pages[number - 1], "next": number if number < len(self.pages) else None}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    gateway = Api()

    @contextmanager
    def connect(home: Any) -> Iterator[Api]:
        yield gateway

    monkeypatch.setattr(audit, "connect", connect)
    return gateway


def verify(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["audit", "verify", *arguments])


def test_one_decision(api):
    api.pages = [[check("same")]]
    found = verify("--decision", "task-1")
    assert found.exit_code == 0 and "task task-1 (answer, decided, position 7): same" in found.output
    assert api.asked == [{"task": "task-1", "job": "", "after": 0}]


@pytest.mark.parametrize(
    ("result", "shown", "code"), [("differs", ": differs", 1), ("not_checkable", ": not checkable", 0)]
)
def test_reasons_are_told_and_what_differs_is_a_failure(api, result, shown, code):
    api.pages = [[check(result, "winner: recorded is 2\u202e[bold]", "another")]]
    found = verify("--decision", "task-1")
    assert found.exit_code == code
    assert shown in found.output and "winner: recorded is 2" in found.output and "another" in found.output
    assert "[bold]" in found.output and "\u202e" not in found.output


def test_all_of_a_job_page_by_page(api):
    api.pages = [[check("same"), check("differs", "why")], [check("same", task="")]]
    found = verify("--decisions", "job-1")
    assert found.exit_code == 1
    assert "join of job job-1 (answer, joined, position 7): same" in found.output
    assert "3 decisions: 2 same, 1 differ, 0 not checkable" in found.output
    assert [one["after"] for one in api.asked] == [0, 1] and api.asked[0]["job"] == "job-1"
    api.asked.clear()
    told = json.loads(verify("--decisions", "all", "--json").output)
    assert (told["ok"], told["counts"]) == (False, {"same": 2, "differs": 1, "not_checkable": 0})
    assert len(told["checks"]) == 3 and api.asked[0]["job"] == ""


def test_it_is_one_thing_at_a_time(api):
    for other in (("--decisions", "all"), ("--file", "x"), ("--against", "x")):
        assert verify("--decision", "task-1", *other).exit_code != 0
    assert not api.asked
