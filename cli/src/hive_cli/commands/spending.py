"""`hive model usage` and `hive model budget`: what calls have used, and what they may."""

import re
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any

import typer
from hive_common.artifacts.quantities import parse_duration
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.money import show_usd

from hive_cli.commands.key import PERIODS, amount_of
from hive_cli.options import HomeOption, JsonOption, LimitOption
from hive_cli.output import err, print_json, print_table
from hive_cli.session import connect

app = typer.Typer(no_args_is_help=True, help="Limit what calls to providers may cost.")

_BY = ("key", "job", "agent", "model", "route", "provider", "day")
_DAY = re.compile(r"\d{4}-\d\d-\d\d\Z")

PerOption = Annotated[str, typer.Option("--per", metavar="PERIOD", help="request, day, month (UTC) or ever.")]
TotalOption = Annotated[bool, typer.Option("--total", help="All calls of this installation together.")]
KeyOption = Annotated[str, typer.Option("--key", metavar="NAME", help="Calls with a key; '*': with each key.")]
JobOption = Annotated[str, typer.Option("--job", metavar="ID", help="Calls of a job; '*': of each job.")]
TaskOption = Annotated[
    str, typer.Option("--task", metavar="ID", help="Calls of a task, in all its attempts and all that it forked.")
]
AgentOption = Annotated[str, typer.Option("--agent", metavar="NAME", help="Calls of an agent; '*': of each one.")]


def usage(
    by: Annotated[str, typer.Option("--by", metavar="WHAT", help=f"One of {', '.join(_BY)}.")] = "key",
    since: Annotated[
        str, typer.Option("--since", metavar="DAY", help="2026-11-26, or a duration such as 7d; days are UTC.")
    ] = "",
    limit: LimitOption = 200,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show what model calls have used, what cost most first. Calls to devices cost nothing.

    A core call is one that an executor of tier `core`, or a provider, has answered.
    """
    if by not in _BY:
        raise InvalidArgument(f"--by: got {by[:40]!r}; expected {', '.join(_BY)}", path="--by")
    with connect(home) as api:
        found = api.get("/v1/model-usage", by=by, since=_day(since), limit=min(limit, 1000))
    if as_json:
        print_json(found)
        return
    columns = (by, "calls", "core", "failed", "tokens in", "tokens out", "cost", "estimated")
    print_table(columns, (_usage_row(row) for row in found["rows"]))


@app.command("set")
def set_budget(
    per: Annotated[
        str, typer.Option("--per", metavar="PERIOD", help="request, day, month (UTC) or ever.")
    ] = "month",
    usd: Annotated[str, typer.Option("--usd", metavar="AMOUNT", help="In USD, such as 5 or 0.50.")] = "",
    tokens: Annotated[str, typer.Option("--tokens", metavar="NUMBER", help="Prompts and answers together.")] = "",
    total: TotalOption = False,
    key: KeyOption = "",
    job: JobOption = "",
    task: TaskOption = "",
    agent: AgentOption = "",
    clear: Annotated[bool, typer.Option("--clear", help="Forget all other limits of it first.")] = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Set a limit, in place of one of the same period and unit. It holds from the next call on."""
    if per not in PERIODS:
        raise InvalidArgument(f"--per: got {per[:40]!r}; expected {', '.join(PERIODS)}", path="--per")
    given = (("usd", usd), ("tokens", tokens))
    limits = [
        {"per": per, "unit": unit, "amount": amount_of(unit, text, f"--{unit}")} for unit, text in given if text
    ]
    if not limits and not clear:
        raise InvalidArgument("expected --usd or --tokens, or --clear")
    body = {"subject": _subject(total, key, job, task, agent), "limits": limits, "clear": clear}
    with connect(home) as api:
        answer = api.post("/v1/model-budgets", body)
    if as_json:
        print_json(answer)
    else:
        _print_budgets([answer])


@app.command("show")
def show(
    total: TotalOption = False,
    key: KeyOption = "",
    job: JobOption = "",
    task: TaskOption = "",
    agent: AgentOption = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Show limits, and what of them is used; without an option all that are set."""
    subject = _subject(total, key, job, task, agent) if total or key or job or task or agent else ""
    with connect(home) as api:
        found = api.get("/v1/model-budgets", subject=subject)
    if as_json:
        print_json(found)
    else:
        _print_budgets(found["budgets"])


@app.command("return")
def return_unaccounted(
    reason: Annotated[str, typer.Option("--reason", help="How it is known. Kept in the log.")],
    total: TotalOption = False,
    key: KeyOption = "",
    job: JobOption = "",
    task: TaskOption = "",
    agent: AgentOption = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Count what is unaccounted as not spent, after a look at the provider's bill.

    A router that is killed leaves money set aside. Calls that were under way may have cost some of it, and nobody
    here knows: until you say so, all of it counts as spent.
    """
    body = {"subject": _subject(total, key, job, task, agent), "reason": reason}
    with connect(home) as api:
        answer = api.post("/v1/model-budgets/return", body)
    if as_json:
        print_json(answer)
    else:
        _print_budgets([answer])


def _subject(total: bool, key: str, job: str, task: str, agent: str) -> str:
    by_kind = (("key", key), ("job", job), ("task", task), ("agent", agent))
    named = [f"{kind}:{name}" for kind, name in by_kind if name]
    chosen = [*(["total"] if total else []), *named]
    if len(chosen) != 1:
        raise InvalidArgument("expected one of --total, --key, --job, --task and --agent")
    return chosen[0]


def _day(since: str) -> str:
    if not since or _DAY.match(since):
        return since
    try:
        ago = timedelta(milliseconds=parse_duration(since, path="--since"))
    except InvalidArgument:
        raise InvalidArgument(f"--since: got {since[:40]!r}; expected 2026-11-26 or 7d", path="--since") from None
    return (datetime.now(UTC) - ago).strftime("%Y-%m-%d")


def _usage_row(row: dict[str, Any]) -> tuple[str, ...]:
    numbers = (f"{row[name]:,}" for name in ("calls", "core", "failed", "prompt_tokens", "completion_tokens"))
    return (
        row["name"] or "-",
        *numbers,
        show_usd(row["nano_usd"]),
        f"{row['estimated']:,}" if row["estimated"] else "",
    )


def _print_budgets(budgets: list[dict[str, Any]]) -> None:
    rows = [
        (
            budget["subject"] + (" (as each)" if budget["inherited"] else ""),
            limit["per"],
            *(_amount(limit, name) for name in ("amount", "spent", "reserved")),
            _amount(limit, "unaccounted") if limit["unaccounted"] else "",
        )
        for budget in budgets
        for limit in budget["limits"]
    ]
    if not rows:
        err.print("no budget is set, so that no call goes to a provider: hive model budget set --help", style="dim")
        return
    print_table(("budget", "per", "limit", "spent", "reserved", "unaccounted"), rows)


def in_words(found: dict[str, Any]) -> str:
    """Return for people what a job's model calls have used; empty where there were none, and it has no budget."""
    used, limits = found["used"], found["budget"]["limits"]
    if not used["calls"] and not limits:
        return ""
    tokens = used["prompt_tokens"] + used["completion_tokens"]
    words = f"{used['calls']:,} model calls, {used['core']:,} of them core, {tokens:,} tokens, "
    words += show_usd(used["nano_usd"])
    spent = [f"{_amount(one, 'spent')} of {_amount(one, 'amount')}{_held(one)}" for one in limits]
    return words + (f"   budget: {', '.join(spent)}" if spent else "")


def _held(limit: dict[str, Any]) -> str:
    period = "" if limit["per"] == "ever" else f" per {limit['per']}"
    return period + (f" ({_amount(limit, 'reserved')} reserved)" if limit["reserved"] else "")


def _amount(limit: dict[str, Any], name: str) -> str:
    amount = int(limit[name])
    return show_usd(amount) if limit["unit"] == "usd" else f"{amount:,} tokens"
