"""`hive agent key`: keys for signing agents, and whose are trusted here."""

from typing import Annotated, Any

import typer
from hive_common.kernel.clock import iso
from hive_common.kernel.errors import InvalidArgument
from rich.markup import escape

from hive_cli import author_keys
from hive_cli.home import find_home
from hive_cli.options import HomeOption, JsonOption
from hive_cli.output import clean, err, out, print_json, print_table
from hive_cli.session import connect_to

app = typer.Typer(no_args_is_help=True, help="Keys for signing agents, and whose are trusted here.")


@app.command("new")
def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What to call it.")],
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Make a key. Nobody trusts it yet, this installation neither."""
    found = find_home(home)
    key = author_keys.new_key(found, name)
    private = author_keys.private_file(found, name)
    if as_json:
        print_json({"name": name, "public_key": key, "private_file": str(private)})
        return
    public = private.with_suffix(".pub")
    out.print(
        f"{escape(str(private))}  [dim]keep it secret[/dim]\n{escape(str(public))}  [dim]give it to others[/dim]"
    )
    err.print(
        f"trust it here:      hive agent key trust {name}\n"
        f"sign with it:       hive agent push DIR --key {name}\n"
        f"others trust it by: hive agent key trust {name}.pub",
        style="dim",
    )


@app.command("list")
def list_keys(as_json: JsonOption = False, home: HomeOption = None) -> None:
    """List the keys of this home, and those that are or were trusted."""
    found = find_home(home)
    own = {author_keys.public_key(found, name): name for name in author_keys.names(found)}
    known: list[dict[str, Any]] = []
    if found.exists():
        with connect_to(found) as api:
            known = api.get("/v1/signers")["keys"]
    said = {key["public_key"] for key in known}
    unsaid = [{"public_key": key, "name": name, "trusted": False} for key, name in own.items() if key not in said]
    keys = [key | {"private": key["public_key"] in own} for key in (*known, *unsaid)]
    if as_json:
        print_json({"keys": keys})
        return
    rows = ((clean(k["name"]), k["public_key"], _trust(k), "here" if k["private"] else "") for k in keys)
    print_table(("name", "key", "trusted", "private half"), rows)


@app.command("trust")
def trust(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Name, file NAME.pub, or 64 hex digits.")],
    name: Annotated[str, typer.Option("--name", help="Whose it is; else as its file or key is called.")] = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Let what this key signs be published and run here."""
    found = find_home(home)
    public_key, called = author_keys.named_public_key(found, key)
    if not (name or called):
        raise InvalidArgument(f"whose key is it? hive agent key trust {key} --name WHOSE", path="--name")
    with connect_to(found) as api:
        answer = api.post("/v1/signers", {"public_key": public_key, "name": name or called})
    if as_json:
        print_json(answer)
        return
    out.print(f"{clean(answer['name'])} is trusted: agents signed with {public_key} may be published and run here")


@app.command("distrust")
def distrust(
    key: Annotated[str, typer.Argument(metavar="KEY", help="Name under which it is trusted, or 64 hex digits.")],
    reason: Annotated[str, typer.Option("--reason", help="Why; for people.")] = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """Let nothing that this key signed be published or run any more. What runs ends."""
    with connect_to(find_home(home)) as api:
        answer = api.post(f"/v1/signers/{key}/distrust", {"reason": reason})
    if as_json:
        print_json(answer)
        return
    out.print(f"{clean(answer['name'])} is not trusted any more: what it signed is neither placed nor run")


def _trust(key: dict[str, Any]) -> str:
    if key["trusted"]:
        return f"since {iso(key['since_us'])[:19]}"
    if "since_us" not in key:
        return "no"
    reason = f": {clean(key['reason'])}" if key["reason"] else ""
    return f"not since {iso(key['since_us'])[:19]}{reason}"
