"""`hive kv`: what agents keep between tasks, for whoever owns it."""

import json
from typing import Annotated

import typer
from rich.markup import escape

from hive_cli.options import HomeOption, JsonOption
from hive_cli.output import clean, err, out, print_json
from hive_cli.session import connect

app = typer.Typer(no_args_is_help=True, help="See and remove what agents keep between tasks.")
NamespaceArgument = Annotated[str, typer.Argument(metavar="NAMESPACE", help="As manifests name it.")]
KeyArgument = Annotated[str, typer.Argument(metavar="KEY", help="Of the value.")]


@app.command("list")
def list_(
    namespace: NamespaceArgument,
    prefix: Annotated[str, typer.Option("--prefix", help="Only keys that begin so.")] = "",
    as_json: JsonOption = False,
    home: HomeOption = None,
) -> None:
    """List the keys of a namespace."""
    with connect(home) as api:
        keys = list(api.pages(f"/v1/values/{namespace}/keys", "keys", "after", prefix=prefix))
    if as_json:
        print_json({"keys": keys})
        return
    if not keys:
        which = f"no key of {namespace} begins with {prefix}" if prefix else f"nothing is kept in {namespace}"
        err.print(escape(which), style="dim")
    for key in keys:
        out.print(escape(key))


@app.command()
def get(
    namespace: NamespaceArgument, key: KeyArgument, as_json: JsonOption = False, home: HomeOption = None
) -> None:
    """Show a value."""
    with connect(home) as api:
        answer = api.get(f"/v1/values/{namespace}", key=key)
    if as_json:
        print_json(answer)
        return
    out.print(escape(clean(json.dumps(answer["value"], ensure_ascii=False, indent=2))))


@app.command()
def delete(
    namespace: NamespaceArgument, key: KeyArgument, as_json: JsonOption = False, home: HomeOption = None
) -> None:
    """Remove a value, at once and whoever wrote it."""
    with connect(home) as api:
        answer = api.delete(f"/v1/values/{namespace}", key=key)
    if as_json:
        print_json(answer)
        return
    out.print(f"[green]✓[/green] {escape(namespace)} has no {escape(key)} any more")
