"""Programs can read every command that prints data: it takes `--json`."""

from collections.abc import Iterator
from typing import Any

import typer
from hive_cli.main import app

PRINTS_NO_DATA = {"up", "executor join"}


def commands(command: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every command that is no group, by its words."""
    inside = getattr(command, "commands", None)
    if inside:
        for name, inner in inside.items():
            yield from commands(inner, f"{path} {name}".strip())
    else:
        yield path, command


ALL = dict(commands(typer.main.get_command(app)))


def test_every_command_of_the_spine_is_there() -> None:
    job = {f"job {name}" for name in ("list", "show", "watch", "logs", "cancel", "explain", "events")}
    agent = {f"agent {name}" for name in ("init", "run", "push", "list")}
    rest = {
        "up",
        "down",
        "status",
        "run",
        "doctor",
        "executor list",
        "executor drain",
        "executor token",
        "executor join",
        "executor revoke",
        "audit verify",
        "audit export",
        "model list",
        "model explain",
        "model chat",
    }
    assert job | agent | rest <= ALL.keys()


def test_every_command_that_prints_data_takes_json() -> None:
    without = {
        name for name, command in ALL.items() if not any("--json" in parameter.opts for parameter in command.params)
    }
    assert without == PRINTS_NO_DATA
