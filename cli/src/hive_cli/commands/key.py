"""`hive key`: who may call, besides whoever holds the owner's key."""

import hashlib
import secrets
import time
from typing import Annotated, Any

import typer
from hive_common.contracts.keys import SECRET_PREFIX
from hive_common.kernel.errors import InvalidArgument
from hive_common.kernel.money import parse_usd
from rich.markup import escape

from hive_cli.options import HomeOption, JsonOption, LimitOption
from hive_cli.output import clean, err, out, print_json, print_table
from hive_cli.session import connect

app = typer.Typer(
    no_args_is_help=True, help="Make keys for programs and people, limit what they spend, revoke them."
)
NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="Small letters, digits, `.`, `_` and `-`.")]

PERIODS = ("request", "day", "month", "ever")
_SECRET_BYTES = 32


@app.command("create")
def create(
    name: NameArgument,
    cloud: Annotated[
        bool, typer.Option("--cloud", help="Its calls may go to providers that cost money, within a budget.")
    ] = False,
    budget: Annotated[
        list[str] | None,
        typer.Option(
            "--budget",
            metavar="UNIT=AMOUNT/PERIOD",
            help="What calls to providers may cost: usd=5/month, tokens=100000/day, usd=0.10/request, usd=50/ever.",
        ),
    ] = None,
    pin: Annotated[
        str, typer.Option("--pin", help="Where its data may go: own-devices, pool, region:NAME or any.")
    ] = "any",
    counts_only: Annotated[
        bool, typer.Option("--counts-only", help="Keep no prompts and no answers of its model calls.")
    ] = False,
    admin: Annotated[
        bool, typer.Option("--admin", help="It may do everything; else call models, submit jobs, and see its own.")
    ] = False,
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Make a key. It is shown here and kept nowhere; its name is never used again."""
    # Made here, so that only its digest travels, and so that asking again after a lost answer makes no second one.
    secret = SECRET_PREFIX + secrets.token_urlsafe(_SECRET_BYTES)
    body = {
        "name": name,
        "admin": admin,
        "cloud": cloud,
        "pin": pin,
        "counts_only": counts_only,
        "digest": hashlib.sha256(secret.encode()).hexdigest(),
        "budgets": [limit_of(text) for text in budget or ()],
    }
    with connect(home) as api:
        answer = api.post("/v1/keys", body)
    if as_json:
        print_json(answer | {"secret": secret})
        return
    out.print(secret, markup=False)
    err.print(f"This is the key `{escape(name)}`: it {_may(answer['key'])}. It is not shown again.", style="dim")
    if cloud and not budget:
        err.print(f"It has no budget of its own; set one: hive model budget set --key {name} --usd 5 --per month")


@app.command("list")
def list_keys(limit: LimitOption = 1000, as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List the keys that were made, those that are revoked too. The owner's own key is not among them."""
    with connect(home) as api:
        pages = api.pages("/v1/keys", "keys", "after", limit=min(limit, 1000))
        found = [one for one, _ in zip(pages, range(limit), strict=False)]
    if as_json:
        print_json({"keys": found})
        return
    columns = ("name", "scope", "cloud", "pin", "keeps", "made", "state")
    print_table(columns, (_row(one) for one in found))


@app.command("revoke")
def revoke(
    name: NameArgument,
    reason: Annotated[str, typer.Option("--reason", help="Kept in the log.")] = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Refuse a key from now on, for ever."""
    with connect(home) as api:
        answer = api.post(f"/v1/keys/{name}/revoke", {"reason": reason})
    if as_json:
        print_json(answer)
    else:
        out.print(f"{escape(clean(answer['name']))} is revoked")


def limit_of(text: str) -> dict[str, Any]:
    """Return the limit that a text such as `usd=5/month` means.

    Raises:
        InvalidArgument: it means none.
    """
    unit, equals, rest = text.partition("=")
    amount, slash, per = rest.partition("/")
    if not (equals and slash) or unit not in ("usd", "tokens") or per not in PERIODS:
        raise InvalidArgument(
            f"--budget: got {text[:80]!r}; expected such as usd=5/month, tokens=100000/day or usd=0.10/request",
            path="--budget",
        )
    return {"per": per, "unit": unit, "amount": amount_of(unit, amount, "--budget")}


def amount_of(unit: str, text: str, path: str) -> int:
    """Return nano-USD, or tokens. Raises InvalidArgument where the text is no amount."""
    if unit == "usd":
        return parse_usd(text, path)
    digits = text.replace(",", "").replace("_", "")
    if not digits.isdecimal():
        raise InvalidArgument(f"{path}: got {text[:40]!r}; expected a number of tokens such as 100000", path=path)
    return int(digits)


def _may(key: dict[str, Any]) -> str:
    rights = "may do everything" if key["scope"] == "admin" else "may call models, submit jobs, and see its own"
    return rights + (", and spend money at providers within its budgets" if key["cloud"] else "")


def _row(one: dict[str, Any]) -> tuple[str, ...]:
    made = time.strftime("%Y-%m-%d", time.localtime(one["created_us"] / 1e6))
    keeps = "counts" if one["counts_only"] else "texts"
    state = "revoked" if one["revoked_us"] else "good"
    return one["name"], one["scope"], "yes" if one["cloud"] else "", one["pin"], keeps, made, state
