"""`hive kill`: what it signs, what it does when others give orders too, and what it says."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from hive_cli.commands import kill
from hive_cli.home import Home
from hive_cli.supervisor.configs import write_configs
from hive_cli.supervisor.containers import hand_out
from hive_cli.supervisor.provision import provision
from hive_common.contracts.messages import KillOrder
from hive_common.control import keys
from hive_common.control.verifier import Verifier
from hive_common.kernel.errors import (
    Conflict,
    FailedPrecondition,
    HiveError,
    InvalidArgument,
    NotFound,
    PermissionDenied,
    Unavailable,
)
from hive_common.kernel.ids import new_id
from hive_common.testing.kills import KillKey
from typer.testing import CliRunner

DEVICE, JOB = new_id(), new_id()


class Registry:
    """The gateway and the registry behind it: takes the order that follows, if it is signed with its key."""

    def __init__(self, public: str) -> None:
        self.verifier = Verifier(public)
        self.others: list[KillOrder] = []
        self.job_state = "running"
        self.is_away = False

    def get(self, path: str, **params: Any) -> Any:
        if self.is_away:
            raise Unavailable("the gateway does not answer")
        if path == "/v1/executors/laptop":
            return {"executor_id": DEVICE}
        if path == f"/v1/jobs/{JOB}":
            return {"state": self.job_state}
        if path != "/v1/control/kill":
            raise NotFound(f"there is no {path}")
        signed, order = self.verifier.signed, self.verifier.order
        return {
            "epoch": self.verifier.epoch,
            "order": signed.order if signed else "",
            "signature": signed.signature if signed else "",
            "stops": [{"scope": e.partition(":")[0]} for e in (order.standing if order else ())],
        }

    def post(self, path: str, body: Any) -> Any:
        assert path == "/v1/control/kill"
        if self.others:
            self.verifier.take(self.others.pop())
        signed = KillOrder(**body)
        self.verifier.check_next(signed)
        self.verifier.take(signed)
        return self.get(path)


@pytest.fixture
def home(tmp_path: Path) -> Home:
    home = Home(tmp_path / "home")
    provision(home, 1)
    return home


@pytest.fixture
def key(home: Home) -> Any:
    return keys.private_key(home.kill_key_file.read_text(), "here")


@pytest.fixture
def registry(key: Any, monkeypatch: pytest.MonkeyPatch) -> Registry:
    registry = Registry(keys.public_text(key))
    monkeypatch.setattr(kill, "connect_to", lambda *_: contextlib.nullcontext(registry))
    return registry


@pytest.fixture
def run(home: Home) -> Callable[..., Result]:
    from hive_cli.main import app

    def invoke(*arguments: str) -> Result:
        return CliRunner().invoke(app, [*arguments, "--home", str(home.root)])

    return invoke


def failed(result: Result, kind: type[HiveError]) -> str:
    assert isinstance(result.exception, kind), result.exception
    return result.exception.message


@pytest.mark.parametrize(
    ("option", "entry"),
    [
        (("--all",), "all"),
        (("--agent", "square@1.0.0"), "agent:square@1.0.0"),
        (("--executor", "laptop"), f"executor:{DEVICE}"),
        (("--job", JOB), f"job:{JOB}"),
    ],
    # Made from ids that are new in every process they would be others in each.
    ids=["all", "agent", "executor", "job"],
)
def test_each_option_stops_what_it_names_and_lifts_it_again(
    run: Callable[..., Result], registry: Registry, option: tuple[str, ...], entry: str
) -> None:
    done = run("kill", *option, "--reason", "drill")
    assert done.exit_code == 0, done.exception
    assert registry.verifier.order is not None
    assert (registry.verifier.order.standing, registry.verifier.order.reason) == ((entry,), "drill")
    assert run("unkill", *option).exit_code == 0
    assert (registry.verifier.epoch, registry.verifier.order.standing) == (2, ())


def test_an_order_that_came_meanwhile_is_taken_into_account(
    run: Callable[..., Result], registry: Registry, home: Home
) -> None:
    other = KillKey()
    other._key = keys.private_key(home.kill_key_file.read_text(), "here")
    registry.others = [other.kill("job", JOB)]
    assert run("kill", "--all").exit_code == 0
    assert registry.verifier.order is not None
    assert (registry.verifier.epoch, registry.verifier.order.standing) == (2, ("all", f"job:{JOB}"))


def test_what_is_stopped_already_is_no_error_and_what_is_not_is_one(
    run: Callable[..., Result], registry: Registry
) -> None:
    run("kill", "--all")
    again = run("kill", "--all")
    assert (again.exit_code, registry.verifier.epoch) == (0, 1)
    assert "stopped already" in again.output
    assert "agent square is not stopped" in failed(run("unkill", "--agent", "square"), FailedPrecondition)


def test_one_sentence_for_each_mistake(run: Callable[..., Result], registry: Registry) -> None:
    assert "expected one of" in failed(run("kill"), InvalidArgument)
    assert "expected one of" in failed(run("kill", "--all", "--job", JOB), InvalidArgument)
    assert "expected the id of a job" in failed(run("kill", "--job", "mine"), InvalidArgument)
    assert "there is no" in failed(run("kill", "--executor", "nobody"), NotFound)
    registry.job_state = "succeeded"
    assert "is over, succeeded" in failed(run("kill", "--job", JOB), FailedPrecondition)
    registry.is_away = True
    assert "hive down" in failed(run("kill", "--all"), Unavailable)
    assert registry.verifier.epoch == 0


def test_orders_of_another_installation_are_not_built_upon(run: Callable[..., Result], registry: Registry) -> None:
    stranger = KillKey()
    registry.verifier = Verifier(stranger.public)
    registry.verifier.take(stranger.kill("all"))
    assert "not signed" in failed(run("kill", "--job", JOB), PermissionDenied)


def test_without_its_key_a_home_gives_no_orders(run: Callable[..., Result], registry: Registry, home: Home) -> None:
    home.kill_key_file.unlink()
    assert "kill-key is not here" in failed(run("kill", "--all"), FailedPrecondition)


def test_every_process_has_the_public_key_and_none_the_private_one(home: Home, key: Any, tmp_path: Path) -> None:
    settings = home.settings()
    write_configs(home, settings, settings.executors, tmp_path)
    private = home.kill_key_file.read_text().strip()
    for name in ("registry", "scheduler", "router", "gateway", "audit", "executor-1"):
        config = home.config_file(name).read_text()
        assert json.loads(config)["kill_public_key"] == keys.public_text(key)
        assert private not in config
    apart = Home(tmp_path / "apart")
    hand_out(apart, tmp_path / "parts", 1)
    assert not list((tmp_path / "parts").rglob("kill-key*"))


def test_two_orders_again_and_again_at_the_same_time_end_in_an_error(
    run: Callable[..., Result], registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str, body: Any) -> Any:
        raise Conflict("another kill order came at the same time; give this one again")

    monkeypatch.setattr(registry, "post", refuse)
    assert "at the same time" in failed(run("kill", "--all"), Conflict)
