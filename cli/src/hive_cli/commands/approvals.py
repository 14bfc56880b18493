"""`hive approvals`: what attempts may do only if a person says so, and the person who does."""

import time
from typing import Annotated, Any

import typer
from hive_common.kernel.errors import FailedPrecondition
from rich.markup import escape

from hive_cli.options import HomeOption, JsonOption
from hive_cli.output import clean, err, out, print_json, print_table
from hive_cli.session import connect

app = typer.Typer(
    invoke_without_command=True, help="Decide over what agents may do only with your approval, each time."
)
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="Of the approval; the list shows it.")]
ReasonOption = Annotated[str, typer.Option("--reason", help="Kept in the log; of a refusal the agent is told.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask: decide over the action as it is now.")]
HashOption = Annotated[
    str, typer.Option("--hash", help="Decide only if the action has this hash, as `hive approvals show` gave it.")
]


@app.callback()
def approvals(context: typer.Context, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List what waits for you, or look at one and decide."""
    if context.invoked_subcommand is None:
        list_(as_json=as_json, home=home)


@app.command("list")
def list_(
    everything: Annotated[bool, typer.Option("--all", help="What was decided in open jobs too.")] = False,
    job: Annotated[str, typer.Option("--job", metavar="JOB", help="Only of this job.")] = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List what waits for a decision, oldest first."""
    with connect(home) as api:
        answer = api.get("/v1/approvals", all=str(everything).lower(), job=job)
    if as_json:
        print_json(answer)
        return
    if not answer["approvals"]:
        out.print("nothing waits for a decision")
        return
    print_table(
        ("id", "state", "agent", "permission", "until", "what"),
        (
            (
                one["approval_id"],
                one["state"],
                one["agent"],
                one["permission"],
                _time(one["expires_us"]),
                _what(one),
            )
            for one in answer["approvals"]
        ),
    )
    out.print("look at one: hive approvals show ID", style="dim")


@app.command()
def show(approval: IdArgument, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Show what an attempt wants to do, and the hash that stands for just that."""
    with connect(home) as api:
        found = api.get(f"/v1/approvals/{approval}")
    if as_json:
        print_json(found)
        return
    _show(found)


@app.command()
def approve(
    approval: IdArgument,
    reason: ReasonOption = "",
    yes: YesOption = False,
    hash_: HashOption = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Let an attempt do it, just this."""
    _decide("approve", approval, reason, yes, hash_, as_json, home)


@app.command()
def deny(
    approval: IdArgument,
    reason: ReasonOption = "",
    yes: YesOption = False,
    hash_: HashOption = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Refuse it: the attempt ends with permission_denied, and its task with it."""
    _decide("deny", approval, reason, yes, hash_, as_json, home)


def _decide(verb: str, approval: str, reason: str, yes: bool, hash_: str, as_json: bool, home: HomeOption) -> None:
    with connect(home) as api:
        found = api.get(f"/v1/approvals/{approval}")
        if not yes:
            _show(found, to_err=as_json)
            if not typer.confirm(f"{verb} this?", err=as_json):
                raise FailedPrecondition("nothing was decided")
        body = {"hash": hash_ or found["hash"], "reason": reason}
        answer = api.post(f"/v1/approvals/{approval}/{verb}", body)
    if as_json:
        print_json(answer)
        return
    out.print(f"[green]✓[/green] {escape(answer['state'])}: {escape(clean(_what(answer)))}")


def _show(found: dict[str, Any], *, to_err: bool = False) -> None:
    console = err if to_err else out
    console.print(f"{escape(clean(found['agent']))} wants to use the permission {escape(found['permission'])}:")
    for line in found["shown"]:
        console.print(escape(f"  {clean(line)}"))
    console.print(f"hash  {escape(found['hash'])}")
    console.print(f"task  {escape(found['task_id'])}, attempt {found['attempt']}, of job {escape(found['job_id'])}")
    decided = f" by {escape(clean(found['by']))}" if found["by"] else ""
    why = f": {escape(clean(found['reason']))}" if found["reason"] else ""
    console.print(f"state {escape(found['state'])}{decided}{why}; to be decided until {_time(found['expires_us'])}")


def _what(one: dict[str, Any]) -> str:
    """Return the lines of an action that say most of it, as one."""
    lines = [line for line in one["shown"] if not line.startswith(("agent: ", "permission: "))]
    told = ", ".join(line.removeprefix("what.") for line in lines if "sha256" not in line.partition(": ")[0])
    return told if len(told) <= _WHAT_CHARACTERS_MAX else told[: _WHAT_CHARACTERS_MAX - 1] + "…"


_WHAT_CHARACTERS_MAX = 100


def _time(at_us: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_us / 1e6))
