"""`hive pain`: what fails again and again, and where to look at it."""

import re
import time
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from hive_common.artifacts.quantities import parse_duration
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.money import show_usd
from rich.markup import escape

from hive_cli.options import HomeOption, JsonOption, LimitOption
from hive_cli.output import clean, err, out, print_json, print_table
from hive_cli.session import connect

app = typer.Typer(invoke_without_command=True, help="See what fails again and again, and what it costs.")
_DAY = re.compile(r"\d{4}-\d\d-\d\d\Z")
_MESSAGE_CHARACTERS_MAX = 90
_COLUMNS = (
    *("fingerprint", "times", "jobs", "agent", "code", "executors", "last", "time", "tokens", "cost", "message"),
)

SinceOption = Annotated[
    str, typer.Option("--since", metavar="WHEN", help="A duration such as 24h, or a day (UTC), 2026-11-26.")
]


@app.callback()
def pain(
    context: typer.Context,
    since: SinceOption = "",
    agent: Annotated[str, typer.Option("--agent", metavar="NAME", help="Of one agent, or one version.")] = "",
    limit: LimitOption = 20,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Group failures by their fingerprint, those that come most often first."""
    if context.invoked_subcommand is not None:
        return
    with connect(home) as api:
        found = api.get("/v1/pain", since_us=_since_us(since), agent=agent, limit=min(limit, 200))
    if as_json:
        print_json(found)
        return
    if not found["groups"]:
        out.print("nothing has failed")
        return
    print_table(_COLUMNS, map(_row, found["groups"]))
    if found["truncated"]:
        err.print("only the newest 100,000 failures are counted; --since bounds them", style="dim")
    out.print("look at one: hive pain show FINGERPRINT", style="dim")


@app.command()
def show(
    fingerprint: Annotated[str, typer.Argument(metavar="FINGERPRINT", help="Or how it begins, from 4 characters.")],
    since: SinceOption = "",
    examples: Annotated[int, typer.Option("--examples", min=1, max=20, help="How many.")] = 5,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show one group with examples, newest first, and how to look at each."""
    if not re.fullmatch("[0-9a-f]{4,16}", fingerprint):
        raise InvalidArgument(
            f"FINGERPRINT: got {fingerprint[:40]!r}; expected 4 to 16 hexadecimal digits, as `hive pain` shows them"
        )
    with connect(home) as api:
        found = api.get(f"/v1/pain/{fingerprint}", since_us=_since_us(since), examples=examples)
    if as_json:
        print_json(found)
        return
    group = found["group"]
    _line("failure", f"{group['agent']}: {group['code']}: {group['message']}")
    period = f"{_time(group['first_us'])} to {_time(group['last_us'])}"
    _line("times", f"{group['failures']:,} in {group['jobs']:,} jobs, {period}")
    _line("agents", ", ".join(group["agents"]))
    more = group["executor_count"] - len(group["executors"])
    _line("executors", ", ".join(group["executors"]) + (f" and {more} more" if more > 0 else "") or "-")
    cost = f"{group['wall_ms'] / 1_000:,.1f} s, {group['model_calls']:,} model calls, {group['tokens']:,} tokens"
    _line("cost", f"{cost}, {show_usd(group['nano_usd'])}")
    for one in found["examples"]:
        attempt = "without an attempt" if one["attempt"] is None else f"attempt {one['attempt']}"
        out.print(escape(f"\n{_time(one['at_us'])}  {clean(one['agent'])}, step {clean(one['step'])}, {attempt}"))
        out.print(escape(f"  {clean(one['message'])}"))
        out.print(escape(f"  input {one['input_digest'] or 'not known'}"))
        out.print(escape(f"  hive job explain {one['task_id']}"))
        out.print(escape(f"  hive job logs {one['job_id']} --task {one['task_id']}"))


def _row(group: dict[str, Any]) -> tuple[str, ...]:
    message = group["message"]
    return (
        group["fingerprint"],
        f"{group['failures']:,}",
        f"{group['jobs']:,}",
        group["agent"],
        group["code"],
        f"{group['executor_count']:,}",
        _time(group["last_us"]),
        f"{group['wall_ms'] / 1_000:,.1f} s",
        f"{group['tokens']:,}" if group["tokens"] else "",
        show_usd(group["nano_usd"]) if group["nano_usd"] else "",
        message if len(message) <= _MESSAGE_CHARACTERS_MAX else message[: _MESSAGE_CHARACTERS_MAX - 1] + "…",
    )


def _line(name: str, text: str) -> None:
    out.print(f"{name:10}{escape(clean(text))}")


def _time(at_us: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_us / 1e6))


def _since_us(since: str) -> int:
    if not since:
        return 0
    try:
        if _DAY.match(since):
            at = datetime.strptime(since, "%Y-%m-%d").replace(tzinfo=UTC)
        else:
            at = datetime.now(UTC) - timedelta(milliseconds=parse_duration(since, path="--since"))
    except (InvalidArgument, ValueError, OverflowError):
        raise InvalidArgument(f"--since: got {since[:40]!r}; expected 24h or 2026-11-26", path="--since") from None
    return max(0, int(at.timestamp() * 1e6))
