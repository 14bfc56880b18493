"""Options that many commands share."""

from pathlib import Path
from typing import Annotated

import typer

HomeOption = Annotated[
    Path | None,
    typer.Option("--home", metavar="DIR", help="Folder of the installation; else HIVE_HOME, else ~/.hivefabric."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
LimitOption = Annotated[int, typer.Option("--limit", min=1, max=100_000, help="How many at most.")]
InputOption = Annotated[
    list[str] | None,
    typer.Option(
        "--input",
        "-i",
        metavar="NAME=VALUE",
        help="Set a member of the input. JSON is taken as such, NAME=@src/**/*.py gives [{path, text}] of files.",
    ),
]
InputFileOption = Annotated[
    Path | None, typer.Option("--input-file", metavar="FILE", help="A JSON file that is the input.")
]
