"""What commands print: data on stdout, everything else on stderr, and errors as exit codes."""

import json
import re
import sys
from collections.abc import Iterable
from typing import Any

from hive_common.kernel.errors import HiveError
from rich.console import Console
from rich.markup import escape
from rich.table import Table

OK = 0
FAILED = 1
BAD_INPUT = 2
UNREACHABLE = 3
INTERRUPTED = 130

_EXIT_CODES = {
    "invalid_argument": BAD_INPUT,
    "payload_too_large": BAD_INPUT,
    "unauthenticated": BAD_INPUT,
    "permission_denied": BAD_INPUT,
    "not_found": BAD_INPUT,
    "conflict": BAD_INPUT,
    "unavailable": UNREACHABLE,
    "deadline_exceeded": UNREACHABLE,
}
# Everything a terminal would act on: C0 and C1 but for tab and newline, and what turns text around or breaks lines.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")

# Into a file or a pipe rows stay whole, whatever the width of the terminal.
_WIDTH = None if sys.stdout.isatty() else 10_000

out = Console(soft_wrap=True, highlight=False, width=_WIDTH)
err = Console(stderr=True, soft_wrap=True, highlight=False)


def exit_code_of(error: HiveError) -> int:
    """Return the exit code of a command that ends with `error`."""
    return _EXIT_CODES.get(error.code, FAILED)


def print_error(error: HiveError) -> None:
    """Say what went wrong."""
    err.print(f"[red]error:[/red] {escape(clean(error.message))}")


def print_json(value: Any) -> None:
    """Print one JSON document for programs."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, indent=2) + "\n")
    sys.stdout.flush()


def print_json_line(value: Any) -> None:
    """Print JSON on one line, of which there will be several."""
    sys.stdout.write(json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")


def print_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
    """Print rows of text under their titles."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(escape(clean(cell)) for cell in row))
    out.print(table)


def clean(text: str) -> str:
    """Return text of guests and users without what a terminal would obey."""
    return _CONTROL.sub("�", text)


def show_json(value: Any) -> str:
    """Return JSON for people, or text as it is."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=2)
