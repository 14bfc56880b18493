"""How `hive approvals` shows what waits, and that nothing is decided without a yes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hive_cli.commands import approvals
from hive_cli.main import app
from typer.testing import CliRunner

ID, HASH = "0a2b2d9c-0000-8000-8000-000000000001", "a" * 64
FOUND = {
    "approval_id": ID,
    "job_id": "job",
    "task_id": "task",
    "attempt": 1,
    "agent": "caller@1.0.0",
    "permission": "http",
    "state": "pending",
    "hash": HASH,
    "action": "{}",
    "shown": [
        "agent: caller@1.0.0",
        "permission: http",
        "what.url: https://a.test/\u202e[bold]",
        "what.body.bytes: 1",
    ],
    "expires_us": 1_800_000_000_000_000,
    "by": "",
    "reason": "",
    "until_us": 0,
}


class Api:
    """A gateway with one approval."""

    def __init__(self) -> None:
        self.posted: list[tuple[str, Any]] = []

    def get(self, path: str, **params: Any) -> Any:
        return FOUND if path.endswith(ID) else {"approvals": [FOUND]}

    def post(self, path: str, body: Any) -> Any:
        self.posted.append((path, body))
        return {**FOUND, "state": "approved"}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    api = Api()

    @contextmanager
    def connect(home: Any) -> Iterator[Api]:
        yield api

    monkeypatch.setattr(approvals, "connect", connect)
    return api


def hive(*arguments: str, typed: str = "") -> tuple[int, str]:
    done = CliRunner().invoke(app, ["approvals", *arguments], input=typed)
    return done.exit_code, done.output


def test_what_waits_is_listed_in_words_that_a_terminal_does_not_obey(api: Api) -> None:
    for arguments in ((), ("list",)):
        code, said = hive(*arguments)
        assert code == 0
        assert ID in said and "url: https://a.test/" in said and "[bold]" in said
        assert "\u202e" not in said
    assert json.loads(hive("list", "--json")[1])["approvals"] == [FOUND]


def test_one_is_approved_after_a_look_and_a_yes_by_the_hash_that_was_shown(api: Api) -> None:
    code, said = hive("approve", ID, "--reason", "fine", typed="y\n")
    assert code == 0 and HASH in said and "https://a.test/" in said
    assert api.posted == [(f"/v1/approvals/{ID}/approve", {"hash": HASH, "reason": "fine"})]


@pytest.mark.parametrize("typed", ["n\n", "\n", ""])
def test_without_a_yes_nothing_is_decided(api: Api, typed: str) -> None:
    for verb in ("approve", "deny"):
        code, _ = hive(verb, ID, typed=typed)
        assert code != 0
    assert not api.posted


def test_a_program_names_the_hash_and_is_not_asked(api: Api) -> None:
    code, said = hive("deny", ID, "--yes", "--hash", "b" * 64, "--json")
    assert code == 0 and json.loads(said)["state"] == "approved"
    assert api.posted == [(f"/v1/approvals/{ID}/deny", {"hash": "b" * 64, "reason": ""})]
