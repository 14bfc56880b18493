"""`hive executor`: the devices that run tasks."""

import time
from typing import Annotated, Any

import typer

from hive_cli.options import HomeOption, JsonOption, LimitOption
from hive_cli.output import out, print_json, print_table
from hive_cli.session import connect

app = typer.Typer(no_args_is_help=True, help="Look at executors, and take them out of work.")
ExecutorArgument = Annotated[str, typer.Argument(metavar="EXECUTOR", help="Name or id of an executor.")]


@app.command("list")
def list_executors(limit: LimitOption = 1000, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List executors and what they do at the moment."""
    with connect(home) as api:
        pages = api.pages("/v1/executors", "executors", "after", limit=min(limit, 1000))
        found = [one for one, _ in zip(pages, range(limit), strict=False)]
    if as_json:
        print_json({"executors": found})
        return
    print_table(("name", "id", "state", "slots", "running", "device", "last seen"), map(_row, found))


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    can = one["capabilities"] or {}
    device = f"{can.get('os', '?')}/{can.get('arch', '?')}, {can.get('cores', '?')} cores, "
    device += f"{can.get('memory_bytes', 0) / 2**30:.0f} GiB"
    seen = "never" if not one["last_seen_us"] else f"{max(0.0, time.time() - one['last_seen_us'] / 1e6):.0f} s ago"
    return one["name"], one["executor_id"], one["state"], str(one["slots"]), str(one["running"]), device, seen


@app.command("drain")
def drain(
    executor: ExecutorArgument,
    reason: Annotated[str, typer.Option("--reason", help="Kept in the log.")] = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Give an executor no new tasks; what it runs may end."""
    _set(executor, "drain", reason, as_json, home)


@app.command("undrain")
def undrain(executor: ExecutorArgument, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Give an executor tasks again."""
    _set(executor, "undrain", "", as_json, home)


def _set(executor: str, verb: str, reason: str, as_json: bool, home: Any) -> None:
    with connect(home) as api:
        answer = api.post(f"/v1/executors/{executor}/{verb}", {"reason": reason})
    if as_json:
        print_json(answer)
    else:
        out.print(f"{answer['name']} is {answer['state']}")
