import contextlib
import json
from collections.abc import Callable
from typing import Any

import pytest
from click.testing import Result
from hive_cli.commands import executor
from hive_cli.commands.executor import COLUMNS, rows
from hive_common.contracts.joining import JoinToken
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.ids import new_id
from typer.testing import CliRunner

LAPTOP = {
    "name": "laptop",
    "executor_id": "e-1",
    "owner": "o-1",
    "owner_name": "",
    "state": "online",
    "capabilities": {
        "cores": 8,
        "memory_bytes": 16 << 30,
        "runtimes": ["python", "command"],
        "version": "0.1.0",
        "models": [{"name": "a"}, {"name": "b"}],
        "power": {"battery_percent": 80, "charging": False},
    },
    "slots": 4,
    "running": 1,
    "last_seen_us": 98_000_000,
    "reputation": {
        **{"standing": "known", "in_a_row": 12, "valid": 40, "invalid": 1, "late": 0, "lost": 2},
        "agents": [{"agent": "guess@1.0.0", "in_a_row": 12, "valid": 40, "invalid": 1, "late": 0, "lost": 2}],
    },
}


def row(**changes: Any) -> dict[str, str]:
    (found,) = rows([LAPTOP | changes], 100.0, "o-1")
    return dict(zip(COLUMNS, found, strict=True))


def test_a_row_says_whose_it_is_what_it_can_do_and_when_it_was_seen() -> None:
    assert row() == {
        "name": "laptop",
        "id": "e-1",
        "owner": "you",
        "state": "online",
        "tier": "worker",
        "version": "0.1.0",
        "cores": "8",
        "memory": "16 GiB",
        "runtimes": "python,command",
        "slots": "4",
        "running": "1",
        "models": "a, b",
        "power": "80 %",
        "standing": "known",
        "results": "40 valid, 1 invalid, 2 lost",
        "last seen": "2 s ago",
    }


def test_the_owner_of_another_machine_is_named_where_the_name_is_known() -> None:
    assert row(owner="o-2", owner_name="Grandma")["owner"] == "Grandma"
    assert row(owner="o-2")["owner"] == "o-2"


def test_who_never_said_hello_is_shown_without_what_is_not_known() -> None:
    shown = row(capabilities=None, last_seen_us=None)
    assert shown["tier"] == "?"
    unknown = {name: shown[name] for name in ("version", "cores", "memory", "runtimes", "models", "power")}
    assert unknown == dict.fromkeys(("version", "cores", "memory", "runtimes", "power"), "?") | {"models": "-"}
    assert shown["last seen"] == "never"


def test_standing_is_shown_where_it_is_known() -> None:
    assert (row(reputation=None)["standing"], row(reputation=None)["results"]) == ("?", "?")
    new = dict.fromkeys(("valid", "invalid", "late", "lost", "in_a_row"), 0) | {"standing": "new", "agents": []}
    assert (row(reputation=new)["standing"], row(reputation=new)["results"]) == ("new", "-")


def test_power_and_many_models_are_put_shortly() -> None:
    can = LAPTOP["capabilities"]
    assert isinstance(can, dict)
    assert row(capabilities=can | {"power": {}})["power"] == "mains"
    assert row(capabilities=can | {"power": {"battery_percent": 7}})["power"] == "7 %, charging"
    assert row(capabilities=can | {"models": [{"name": str(n)} for n in range(5)]})["models"] == "5"
    assert row(capabilities=can | {"models": []})["models"] == "-"


class Installation:
    """Stands in for the gateway: answers what a test says, and keeps what was asked."""

    def __init__(self, url: str) -> None:
        self.asked: list[tuple[str, str, Any]] = []
        token = JoinToken(url=url, fingerprint="", token_id=new_id(), secret="s", expires_us=1_790_000_000_000_000)
        self.token = token.text()

    def get(self, path: str) -> Any:
        self.asked.append(("GET", path, None))
        return LAPTOP

    def post(self, path: str, body: Any) -> Any:
        self.asked.append(("POST", path, body))
        if path == "/v1/executors/tokens":
            return {"token_id": "t", "token": self.token, "expires_us": 1_790_000_000_000_000}
        return LAPTOP | {"state": "revoked"}


@pytest.fixture
def hive(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Installation, Result]]:
    """Returns a function that runs `hive executor …` against a stand-in."""

    def run(*words: str, url: str = "https://192.0.2.1:8500", typed: str = "") -> tuple[Installation, Result]:
        installation = Installation(url)
        monkeypatch.setattr(executor, "connect", lambda home: contextlib.nullcontext(installation))
        return installation, CliRunner().invoke(executor.app, words, input=typed)

    return run


def test_a_token_alone_goes_to_stdout_and_what_to_type_there_to_stderr(hive: Any) -> None:
    installation, result = hive("token", "--valid", "2h", "--owner", "Grandma")
    assert installation.asked == [("POST", "/v1/executors/tokens", {"valid_s": 7200, "owner": "Grandma"})]
    assert result.stdout.replace("\n", "") == installation.token
    assert f"hive executor join {installation.token}" in result.stderr.replace("\n", "")
    assert "--public" not in result.stderr


def test_a_token_that_no_other_machine_can_use_says_so(hive: Any) -> None:
    _, result = hive("token", url="http://127.0.0.1:8500")
    assert "hive up --public ADDRESS" in result.stderr.replace("\n", " ")


def test_a_token_for_programs_is_json(hive: Any) -> None:
    installation, result = hive("token", "--json")
    answer = json.loads(result.stdout)
    assert (answer["token"], answer["url"]) == (installation.token, "https://192.0.2.1:8500")
    assert answer["command"] == f"hive executor join {installation.token}"


def test_how_long_a_token_is_good_wants_a_unit(hive: Any) -> None:
    _, result = hive("token", "--valid", "soon")
    assert isinstance(result.exception, InvalidArgument)
    assert "--valid" in result.exception.message


@pytest.mark.parametrize(
    ("words", "typed", "revoked"), [((), "n\n", False), ((), "y\n", True), (("--yes",), "", True)]
)
def test_nobody_is_shut_out_by_a_slip_of_the_hand(
    hive: Any, words: tuple[str, ...], typed: str, revoked: bool
) -> None:
    installation, result = hive("revoke", "laptop", "--reason", "sold", *words, typed=typed)
    posts = [asked for asked in installation.asked if asked[0] == "POST"]
    assert posts == ([("POST", "/v1/executors/e-1/revoke", {"reason": "sold"})] if revoked else [])
    assert result.exit_code == (0 if revoked else 1)
    assert ("laptop is revoked" in result.stdout) == revoked
    assert ("laptop (e-1), online, 1 running" in result.stderr) == (not words)
