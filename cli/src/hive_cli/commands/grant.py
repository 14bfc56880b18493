"""`hive agent grant`, `grants`, `ungrant`: what agents may do, decided by people."""

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any

import typer
from hive_common.kernel.clock import iso
from hive_common.kernel.errors import InvalidArgument
from rich.markup import escape

from hive_cli.options import HomeOption, JsonOption
from hive_cli.output import clean, out, print_json, print_table
from hive_cli.session import connect

if TYPE_CHECKING:
    from hive_common.artifacts.manifest import AgentManifest
    from rich.console import Console

    from hive_cli.api import Api

NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Of the agent.")]
ListOption = list[str] | None
_STATES = {
    "granted": "granted",
    "asked": "not granted",
    "expired": "expired",
    "stale": "asks for more now",
    "unused": "granted, not asked for",
}


def grant(
    name: NameArgument,
    permissions: Annotated[
        list[str], typer.Argument(metavar="PERMISSION...", help="model, http, kv, fork, scratch; all it asks for.")
    ],
    models: Annotated[ListOption, typer.Option("--models", help="model: only these; commas between.")] = None,
    max_tokens: Annotated[int | None, typer.Option("--max-tokens", help="model: no more per attempt.")] = None,
    pin: Annotated[str | None, typer.Option("--pin", help="model: own-devices, pool or region:<name>.")] = None,
    hosts: Annotated[ListOption, typer.Option("--hosts", help="http: only these; commas between.")] = None,
    methods: Annotated[ListOption, typer.Option("--methods", help="http: only these; commas between.")] = None,
    quota: Annotated[str | None, typer.Option("--quota", help="kv: no more than this, such as 64Ki.")] = None,
    agents: Annotated[ListOption, typer.Option("--agents", help="fork: only these; commas between.")] = None,
    max_: Annotated[int | None, typer.Option("--max", help="fork: no more children of one task.")] = None,
    depth: Annotated[int | None, typer.Option("--depth", help="fork: no deeper.")] = None,
    size: Annotated[str | None, typer.Option("--size", help="scratch: no more than this, such as 64Mi.")] = None,
    ask: Annotated[bool, typer.Option("--ask", help="A person is asked at each use.")] = False,
    until: Annotated[
        str | None, typer.Option("--until", help="When it ends: 12h, 30d, or a time such as 2027-01-31T18:00Z.")
    ] = None,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Let an agent do what it asks for, or less, in all versions that ask for no more than the newest one does."""
    narrower: dict[str, dict[str, Any]] = {
        "model": {"names": _listed(models), "max_tokens": max_tokens, "pin": pin},
        "http": {"hosts": _listed(hosts), "methods": _listed(methods)},
        "kv": {"quota": quota},
        "fork": {"agents": _listed(agents), "max": max_, "depth": depth},
    }
    wanted: dict[str, Any] = {permission: _given(narrower.get(permission, {})) for permission in permissions}
    if size is not None and "scratch" in wanted:
        wanted["scratch"] = size
    _check_used(narrower | {"scratch": {"size": size}}, permissions)
    body = {"permissions": wanted, "ask": ask, "until_us": until_us(until, datetime.now(UTC)) if until else 0}
    with connect(home) as api:
        answer = api.post(f"/v1/agents/{name}/grants", body)
    if as_json:
        print_json(answer)
        return
    out.print(f"[green]✓[/green] {escape(name)} may, in versions that ask for no more than {_version(answer)}:")
    for one in answer["grants"]:
        if one["permission"] in wanted:
            ends = f"\n    until {iso(one['until_us'])[:19]}Z" if one["until_us"] else ""
            out.print(escape(f"  {clean(one['words'])}{ends}"))
    out.print(f"take it back: hive agent ungrant {escape(name)} {' '.join(wanted)}", style="dim")


def grants(name: NameArgument, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List what an agent asks for, and what of it is granted."""
    with connect(home) as api:
        answer = api.get(f"/v1/agents/{name}/grants")
    if as_json:
        print_json(answer)
        return
    if not answer["grants"]:
        out.print(f"{escape(name)}@{_version(answer)} asks for nothing: it can compute, and no more")
        return
    print_table(
        ("permission", "state", "until", "what it means"),
        (
            (
                one["permission"],
                _STATES.get(one["state"], one["state"]),
                iso(one["until_us"])[:19] if one["until_us"] else "",
                clean(one["words"].partition(": ")[2]),
            )
            for one in answer["grants"]
        ),
    )
    missing = _missing(answer)
    if missing:
        out.print(f"grant what is missing: hive agent grant {escape(name)} {' '.join(missing)}", style="dim")


def ungrant(
    name: NameArgument,
    permissions: Annotated[
        list[str] | None, typer.Argument(metavar="[PERMISSION...]", help="Without any: all that are granted.")
    ] = None,
    reason: Annotated[str, typer.Option("--reason", help="Kept in the log.")] = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Take grants back. Tasks that are not given out yet end with permission_denied; what runs goes on."""
    with connect(home) as api:
        answer = api.post(f"/v1/agents/{name}/ungrant", {"permissions": permissions or [], "reason": reason})
    if as_json:
        print_json(answer)
        return
    left = [one["permission"] for one in answer["grants"] if one["granted"] is not None]
    out.print(f"[green]✓[/green] granted to {escape(name)} from now on: {', '.join(left) or 'nothing'}")


def grant_all(api: "Api", manifest: "AgentManifest", console: "Console") -> None:
    """Grant an agent all that it asks for, after saying what that is; for `hive agent push --grant`."""
    from hive_common.permissions import in_words, named

    console.print(f"  {escape(manifest.name)} may from now on:")
    for line in in_words(manifest.asked):
        console.print(escape(f"    {clean(line)}"))
    wanted = dict.fromkeys(named(manifest.asked))
    api.post(f"/v1/agents/{manifest.name}/grants", {"permissions": wanted})


def tell_what_is_missing(api: "Api", manifest: "AgentManifest", console: "Console") -> None:
    """Say what a version that was just published asks for and was not granted."""
    answer = api.get(f"/v1/agents/{manifest.name}/grants")
    missing = _missing(answer)
    if missing:
        console.print(f"  asks for what is not granted: hive agent grant {manifest.name} {' '.join(missing)}")


def _missing(answer: dict[str, Any]) -> list[str]:
    return [one["permission"] for one in answer["grants"] if one["state"] in ("asked", "expired", "stale")]


def until_us(text: str, now: datetime) -> int:
    """Return when something ends, in µs since 1970.

    Args:
        text: a duration from now, or a time in ISO 8601, UTC unless it says otherwise.
        now: the time, with its zone.

    Raises:
        InvalidArgument: neither.
    """
    from hive_common.artifacts.quantities import parse_duration

    if text[-1:].isalpha() and text[:-1].isdigit():
        return int(now.timestamp() * 1_000_000) + parse_duration(text, path="--until") * 1_000
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise InvalidArgument(
            f"--until: {text!r} is no time; expected 12h, 30d, or a time such as 2027-01-31T18:00Z", path="until"
        ) from None
    return int((found if found.tzinfo else found.replace(tzinfo=UTC)).timestamp() * 1_000_000)


def _listed(values: ListOption) -> list[str] | None:
    if values is None:
        return None
    return [part.strip() for value in values for part in value.split(",")]


def _given(fields: dict[str, Any]) -> dict[str, Any] | None:
    return {key: value for key, value in fields.items() if value is not None} or None


def _check_used(narrower: dict[str, dict[str, Any]], permissions: list[str]) -> None:
    for permission, fields in narrower.items():
        given = _given(fields)
        if given and permission not in permissions:
            option = {"names": "models"}.get(next(iter(given)), next(iter(given))).replace("_", "-")
            raise InvalidArgument(
                f"--{option} narrows `{permission}`, which is not among {', '.join(permissions)}; expected "
                f"`{permission}` among the permissions",
                path=option,
            )


def _version(answer: dict[str, Any]) -> str:
    return escape(clean(str(answer["version"])))
