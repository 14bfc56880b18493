"""`hive canary`: what it sends, byte for byte, and what it shows."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from hive_cli.commands import canary
from hive_cli.main import app
from hive_common.kernel.errors import InvalidArgument
from typer.testing import CliRunner

CANARY = {"canary_id": "c1", "agent": "square@1.0.0", "equal": "json", "key": "sha256:0", "input": {"n": "\u202e3"}}


class Api:
    """A gateway with one canary."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Any]] = []

    def post(self, path: str, body: Any) -> Any:
        self.asked.append((path, body))
        return CANARY

    def get(self, path: str, **params: Any) -> Any:
        self.asked.append((path, params))
        return {"canaries": [CANARY]}

    def delete(self, path: str) -> Any:
        self.asked.append((path, None))
        return {**CANARY, "removed": True}


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    gateway = Api()

    @contextmanager
    def connect(home: Any) -> Iterator[Api]:
        yield gateway

    monkeypatch.setattr(canary, "connect", connect)
    return gateway


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, ["canary", *arguments])


def test_input_and_answer_are_sent_as_they_were_given_or_as_they_stand_in_a_file(api, tmp_path):
    file = tmp_path / "answer.json"
    file.write_text('{"square":  9.0}\n')
    found = run("add", "square@1.0.0", "--input", '{"n":  3}', "--answer", str(file), "--equal", "exact")
    assert found.exit_code == 0 and "c1" in found.output, found.output
    body = {"agent": "square@1.0.0", "input": '{"n":  3}', "answer": '{"square":  9.0}\n', "equal": "exact"}
    assert api.asked == [("/v1/canaries", body)]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--input", "{", "--answer", "1"), "--input {: is neither JSON nor a file"),
        (("--input", "1", "--answer", "1", "--equal", "numeric"), "expected exact or json"),
    ],
)
def test_what_is_neither_is_refused_before_anything_is_sent(api, options, words):
    found = run("add", "square@1.0.0", *options)
    assert isinstance(found.exception, InvalidArgument) and words in found.exception.message
    assert api.asked == []


def test_they_are_listed_and_removed(api):
    found = run("list", "--agent", "square@1.0.0")
    assert found.exit_code == 0 and "square@1.0.0" in found.output and "\u202e" not in found.output
    found = run("remove", "c1")
    assert found.exit_code == 0 and "removed canary c1" in found.output
    assert api.asked == [("/v1/canaries", {"agent": "square@1.0.0"}), ("/v1/canaries/c1", None)]
