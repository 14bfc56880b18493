"""`hive audit`: check the log, here or in a file."""

import contextlib
from pathlib import Path
from typing import Annotated, Any

import typer
from hive_common.kernel.errors import InvalidArgument, Unavailable
from rich.markup import escape

from hive_cli.options import HomeOption, JsonOption
from hive_cli.output import FAILED, clean, err, out, print_json
from hive_cli.session import connect

app = typer.Typer(no_args_is_help=True, help="Check the log, and take a copy that can be checked elsewhere.")


@app.command("verify")
def verify(
    file: Annotated[
        Path | None, typer.Option("--file", metavar="FILE", help="Check this export, without a database.")
    ] = None,
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="FILE", help="An earlier export that must be the beginning of the log."),
    ] = None,
    decision: Annotated[
        str, typer.Option("--decision", metavar="TASK", help="Instead: recompute the decision over this task.")
    ] = "",
    decisions: Annotated[
        str,
        typer.Option("--decisions", metavar="JOB", help="Instead: recompute those of this job; `all`: every one."),
    ] = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Check every byte of the log. Ends with 1 where it does not hold, and names the first bad position.

    With --decision: apply the rule to the recorded votes and scores again, compare the values where they still
    exist, and hold the record against the events that it was made from. Ends with 1 where something differs.
    """
    if decision or decisions:
        if (decision and decisions) or file is not None or against is not None:
            raise InvalidArgument("expected one of --decision, --decisions, --file and --against")
        _verify_decisions(decision, decisions, as_json, home)
        return
    result = _verify_file(file, against) if file is not None else _verify_log(home, against)
    if as_json:
        print_json(result)
    elif result["ok"]:
        out.print(f"[green]✓[/green] log verified: {result['events']} events, head {result['head']}")
    else:
        err.print(
            f"[red]✗ the log does not verify[/red] at position {result['first_bad_position']}: "
            f"{escape(clean(result['reason'] or ''))}   ({result['events']} events hold)"
        )
    if not result["ok"]:
        raise typer.Exit(FAILED)


def _verify_decisions(task: str, job: str, as_json: bool, home: Path | None) -> None:
    checks: list[dict[str, Any]] = []
    after: int | None = 0
    with connect(home) as api:
        while after is not None:
            page = api.get("/v1/audit/decisions", task=task, job="" if job == "all" else job, after=after)
            checks += page["checks"]
            after = page["next"]
    counts = {name: sum(one["result"] == name for one in checks) for name in ("same", "differs", "not_checkable")}
    if as_json:
        print_json({"ok": not counts["differs"], "counts": counts, "checks": checks})
    else:
        for one in checks:
            _print_decision(one)
        if job:
            told = ", ".join(f"{number} {_SHOWN[name][1]}" for name, number in counts.items())
            out.print(f"{len(checks)} decision{'' if len(checks) == 1 else 's'}: {told}")
    if counts["differs"]:
        raise typer.Exit(FAILED)


_SHOWN = {
    "same": ("[green]✓[/green]", "same"),
    "differs": ("[red]✗[/red]", "differ"),
    "not_checkable": ("[yellow]?[/yellow]", "not checkable"),
}


def _print_decision(one: dict[str, Any]) -> None:
    sign, words = _SHOWN[one["result"]]
    what = f"task {one['task_id']}" if one["task_id"] else f"join of job {one['job_id']}"
    named = f"{what} ({one['step']}, {one['outcome']}, position {one['position']})"
    out.print(f"{sign} {escape(clean(named))}: {'differs' if one['result'] == 'differs' else words}")
    for reason in one["reasons"]:
        out.print(escape(f"    {clean(reason)}"))


def _verify_file(file: Path, against: Path | None) -> dict[str, Any]:
    from hive_audit.export import verify_file

    found = verify_file(file, against)
    return _shape(found.ok, found.events, found.head, found.first_bad_position, found.reason)


def _verify_log(home: Path | None, against: Path | None) -> dict[str, Any]:
    position, digest = None, None
    if against is not None:
        from hive_audit.export import head_of

        head = head_of(against)
        position, digest = head.position, head.hash.hex()
    with connect(home) as api:
        found = api.get("/v1/audit/verify", against_position=position, against_hash=digest)
    return _shape(found["ok"], found["events"], found["head"], found["first_bad_position"], found["reason"])


def _shape(ok: bool, events: int, head: int, first_bad: int | None, reason: str | None) -> dict[str, Any]:
    return {
        "ok": ok,
        "events": events,
        "head": head,
        "first_bad_position": first_bad or None,
        "reason": reason or None,
    }


@app.command("export")
def export(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write; it must not exist.")],
    to: Annotated[int, typer.Option("--to", min=0, help="Last position; 0 is the head.")] = 0,
    force: Annotated[bool, typer.Option("--force", help="Replace the file.")] = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Write all that is needed to check the log without its database."""
    if file.exists() and not force:
        raise InvalidArgument(f"{file}: exists already; expected a new file, or --force", file=str(file))
    draft = file.with_name(file.name + ".part")
    size = 0
    try:
        with (
            connect(home) as api,
            draft.open("wb") as target,
            api.download("/v1/audit/export", to=to) as chunks,
        ):
            for chunk in chunks:
                size += target.write(chunk)
        _require_whole(draft)
        draft.replace(file)
    except OSError as error:
        raise InvalidArgument(f"{file}: cannot be written: {error.strerror}", file=str(file)) from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
    if as_json:
        print_json({"file": str(file), "size_bytes": size})
    else:
        out.print(f"wrote {file} ({size} bytes); check it with: hive audit verify --file {file}")


def _require_whole(draft: Path) -> None:
    with draft.open("rb") as written:
        written.seek(max(0, draft.stat().st_size - 200))
        last = written.read().rstrip(b"\n").rsplit(b"\n", 1)[-1]
    if not last.startswith(b'{"count":'):
        raise Unavailable("the export broke off before its last line; try again")
