"""`hive executor`: the devices that run tasks; which of them may, and which may not any more."""

import time
from collections.abc import Sequence
from typing import Annotated, Any
from urllib.parse import urlsplit

import typer
from hive_common.artifacts.quantities import parse_duration
from hive_common.contracts.joining import parse_token
from hive_common.ops.tls import is_loopback
from rich.markup import escape

from hive_cli.commands import join
from hive_cli.home import find_home
from hive_cli.options import HomeOption, JsonOption, LimitOption
from hive_cli.output import clean, err, out, print_json, print_table
from hive_cli.session import connect

MODELS_SHOWN = 2
"""Names of models in a row; of more than that their number."""

COLUMNS = (
    *("name", "id", "owner", "state", "tier", "version", "cores", "memory", "runtimes"),
    *("slots", "running", "models", "power", "standing", "results", "last seen"),
)
app = typer.Typer(no_args_is_help=True, help="Let machines join, look at executors, and take them out of work.")
ExecutorArgument = Annotated[str, typer.Argument(metavar="EXECUTOR", help="Name or id of an executor.")]


@app.command("token")
def token(
    valid: Annotated[
        str, typer.Option("--valid", metavar="DURATION", help="How long it is good: 1m to 7d.")
    ] = "1h",
    owner: Annotated[
        str, typer.Option("--owner", metavar="NAME", help="Who owns the machine; else the owner of all this.")
    ] = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Make a token with which one other machine may join, once. It is shown here and kept nowhere."""
    valid_s = max(1, parse_duration(valid, path="--valid") // 1000)
    with connect(home) as api:
        answer = api.post("/v1/executors/tokens", {"valid_s": valid_s, "owner": owner})
    text = str(answer["token"])
    url = parse_token(text).url
    if as_json:
        print_json(answer | {"url": url, "command": f"hive executor join {text}"})
        return
    out.print(text)
    until = time.strftime("%H:%M on %d %B", time.localtime(answer["expires_us"] / 1e6))
    err.print(f"one machine may join with it, until {until}. Type there:\n\n  hive executor join {text}\n")
    if is_loopback(urlsplit(url).hostname or ""):
        err.print(f"It has to be this machine: {url} is not for others. To let them in: hive up --public ADDRESS")


@app.command("list")
def list_executors(limit: LimitOption = 1000, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List executors: whose they are, what they can do, and what they do at the moment."""
    with connect(home) as api:
        pages = api.pages("/v1/executors", "executors", "after", limit=min(limit, 1000))
        found = [one for one, _ in zip(pages, range(limit), strict=False)]
    if as_json:
        print_json({"executors": found})
        return
    print_table(COLUMNS, rows(found, time.time(), find_home(home).settings().owner))


def rows(executors: Sequence[dict[str, Any]], now_s: float, mine: str) -> list[tuple[str, ...]]:
    """Return what a table of executors shows, in the order of `COLUMNS`. `mine` is the installation's owner."""
    return [_row(one, now_s, mine) for one in executors]


def _row(one: dict[str, Any], now_s: float, mine: str) -> tuple[str, ...]:
    can = one["capabilities"] or {}
    owner = one["owner_name"] or ("you" if one["owner"] == mine else one["owner"])
    seen = f"{max(0.0, now_s - one['last_seen_us'] / 1e6):.0f} s ago" if one["last_seen_us"] else "never"
    # Before its first hello nobody knows what it can do.
    memory = f"{can['memory_bytes'] / 2**30:.0f} GiB" if can else "?"
    return (
        *(one["name"], one["executor_id"], owner, one["state"], can.get("tier", "worker") if can else "?"),
        *(can.get("version") or "?", str(can.get("cores", "?")), memory, ",".join(can.get("runtimes", ())) or "?"),
        *(str(one["slots"]), str(one["running"]), _models(can.get("models", ())), _power(can)),
        *(*_reputation(one["reputation"]), seen),
    )


def _reputation(known: dict[str, Any] | None) -> tuple[str, str]:
    """Return the standing and the counts. Nobody is asked where the scheduler cannot be."""
    return ("?", "?") if known is None else (known["standing"], _counts(known) or "-")


def _counts(known: dict[str, Any]) -> str:
    """Return counts of judged results and of those that did not come in time, as far as there are any."""
    names = ("valid", "invalid", "late", "lost")
    return ", ".join(f"{known[name]} {name}" for name in names if known[name])


def _models(models: Sequence[dict[str, Any]]) -> str:
    names = [str(model["name"]) for model in models]
    return ", ".join(names) if 0 < len(names) <= MODELS_SHOWN else str(len(names) or "-")


def _power(can: dict[str, Any]) -> str:
    if not can:
        return "?"
    power = can.get("power", {})
    percent = power.get("battery_percent")
    if percent is None:
        return "mains"
    return f"{percent} %" if power.get("charging", True) is False else f"{percent} %, charging"


@app.command("show")
def show(executor: ExecutorArgument, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """Show one executor: whose it is, and what placement goes by."""
    with connect(home) as api:
        found = api.get(f"/v1/executors/{executor}")
    if as_json:
        print_json(found)
        return
    (row,) = rows([found], time.time(), find_home(home).settings().owner)
    can = found["capabilities"] or {}
    labels = ", ".join(f"{name}={value}" for name, value in sorted(can.get("labels", {}).items()))
    shown = {**dict(zip(COLUMNS, row, strict=True)), "device": can.get("device") or "?", "labels": labels or "-"}
    known = found["reputation"]
    if known is not None:
        shown["in a row"] = f"{known['in_a_row']} valid"
    for name, value in shown.items():
        out.print(escape(f"{name:<10} {clean(value)}"))
    agents = known["agents"] if known is not None else []
    if agents:
        out.print()
        rows_of_agents = [
            (one["agent"], *(str(one[name]) for name in ("in_a_row", "valid", "invalid", "late", "lost")))
            for one in agents
        ]
        print_table(("agent", "in a row", "valid", "invalid", "late", "lost"), rows_of_agents)


@app.command("trust")
def trust(
    executor: ExecutorArgument,
    reason: Annotated[str, typer.Option("--reason", help="Kept in the log.")],
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Take an executor out of quarantine: its records begin anew, and its results are checked until it is known."""
    with connect(home) as api:
        answer = api.post(f"/v1/executors/{executor}/trust", {"reason": reason})
    if as_json:
        print_json(answer)
        return
    standing, _ = _reputation(answer["reputation"])
    out.print(f"{escape(clean(answer['name']))} is {standing}: its records begin with nothing")


@app.command("revoke")
def revoke(
    executor: ExecutorArgument,
    reason: Annotated[str, typer.Option("--reason", help="Kept in the log.")] = "",
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Disconnect an executor at once, and shut it out for ever. What it runs goes to others.

    To come back its machine has to join anew, with a new key and a new token. An executor of this machine stays
    out, too; `hive up --executors N` makes another one.
    """
    with connect(home) as api:
        found = api.get(f"/v1/executors/{executor}")
        if not yes:
            about = f"{clean(found['name'])} ({found['executor_id']}), {found['state']}, {found['running']} running"
            typer.confirm(f"Shut {about}, out for ever?", abort=True, err=True)
        answer = api.post(f"/v1/executors/{found['executor_id']}/revoke", {"reason": reason})
    if as_json:
        print_json(answer)
    else:
        out.print(f"{escape(clean(answer['name']))} is {answer['state']}")


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


app.command("join")(join.join)
