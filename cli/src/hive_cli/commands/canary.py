"""`hive canary`: tasks with known answers, by which executors are tried."""

import json
from pathlib import Path
from typing import Annotated

import typer
from hive_common.kernel.errors import InvalidArgument
from rich.markup import escape

from hive_cli.inputs import read_text
from hive_cli.options import HomeOption, JsonOption
from hive_cli.output import clean, out, print_json, print_table
from hive_cli.session import connect

app = typer.Typer(
    no_args_is_help=True, help="Try executors by tasks whose answers you know, mixed with the others."
)
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Of the canary; the list shows it.")]
_SHOWN_MAX = 60


@app.command()
def add(
    agent: Annotated[str, typer.Argument(metavar="AGENT@VERSION", help="Whose task it is; it only computes.")],
    given: Annotated[str, typer.Option("--input", metavar="FILE|JSON", help="What the agent is given.")],
    answer: Annotated[
        str, typer.Option("--answer", metavar="FILE|JSON", help="What it gives. Only a digest of it is kept.")
    ],
    equal: Annotated[
        str, typer.Option("--equal", metavar="exact|json", help="Whether each byte of it counts, or its value.")
    ] = "json",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Give executors a task whose answer you know, now and then, before another of its agent."""
    if equal not in ("exact", "json"):
        raise InvalidArgument(f"--equal {equal}: expected exact or json")
    body = {"agent": agent, "input": _text("--input", given), "answer": _text("--answer", answer), "equal": equal}
    with connect(home) as api:
        added = api.post("/v1/canaries", body)
    if as_json:
        print_json(added)
        return
    out.print(f"[green]✓[/green] canary {escape(added['canary_id'])} of {escape(clean(agent))}")


@app.command("list")
def list_(
    agent: Annotated[str, typer.Option("--agent", metavar="AGENT@VERSION", help="Only of this one.")] = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List them. What executors have answered is counted by hive executor show."""
    with connect(home) as api:
        answer = api.get("/v1/canaries", agent=agent)
    if as_json:
        print_json(answer)
        return
    if not answer["canaries"]:
        out.print("there are no canaries")
        return
    rows = ((one["canary_id"], one["agent"], one["equal"], _shown(one["input"])) for one in answer["canaries"])
    print_table(("id", "agent", "equal", "input"), rows)


@app.command()
def remove(canary: IdArgument, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Give it to nobody any more. What is under way with it judges nobody."""
    with connect(home) as api:
        removed = api.delete(f"/v1/canaries/{canary}")
    if as_json:
        print_json(removed)
        return
    out.print(f"[green]✓[/green] removed canary {escape(removed['canary_id'])}")


def _text(option: str, given: str) -> str:
    """Return a JSON text as it was given, or as it stands in a file."""
    try:
        json.loads(given)
    except ValueError:
        pass
    else:
        return given
    if not Path(given).is_file():
        raise InvalidArgument(f"{option} {given[:80]}: is neither JSON nor a file")
    return read_text(Path(given))


def _shown(value: object) -> str:
    text = clean(json.dumps(value, ensure_ascii=False))
    return text if len(text) <= _SHOWN_MAX else text[: _SHOWN_MAX - 1] + "…"
