"""What a start tells its user, the same on a terminal and through the pipe of `hive up --detach`."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, BinaryIO, Literal

import msgspec
from hive_common.kernel.errors import InvalidArgument

if TYPE_CHECKING:
    from rich.console import Console

Kind = Literal["begin", "done", "note", "ready", "failed"]


class Report(msgspec.Struct, frozen=True):
    """One line of progress. `ready` and `failed` are the last of a start."""

    kind: Kind
    text: str


Reporter = Callable[[Report], None]

_STYLES: dict[Kind, str] = {
    "begin": "[dim]… {}[/dim]",
    "done": "[green]✓[/green] {}",
    "note": "[yellow]![/yellow] {}",
    "ready": "{}",
    "failed": "[red]✗[/red] {}",
}


def to_console(console: "Console") -> Reporter:
    """Return a reporter that prints."""
    from rich.markup import escape  # a detached supervisor prints nothing

    def report(line: Report) -> None:
        console.print(_STYLES[line.kind].format(escape(line.text)), highlight=False, soft_wrap=True)

    return report


def to_pipe(descriptor: int) -> Reporter:
    """Return a reporter that writes JSON lines, until nobody reads them any more.

    Args:
        descriptor: closed after the last line of the start.
    """
    is_open = True

    def report(line: Report) -> None:
        nonlocal is_open
        if not is_open:
            return
        try:
            os.write(descriptor, msgspec.json.encode(line) + b"\n")
        except BrokenPipeError:
            is_open = False
        if not is_open or line.kind in ("ready", "failed"):
            is_open = False
            with contextlib.suppress(OSError):
                os.close(descriptor)

    return report


def from_pipe(stream: BinaryIO) -> Iterator[Report]:
    """Yield the lines that `to_pipe` wrote. Raises InvalidArgument for anything else."""
    for line in stream:
        try:
            yield msgspec.json.decode(line, type=Report)
        except msgspec.DecodeError as error:
            raise InvalidArgument(f"the supervisor wrote {line[:200]!r} instead of progress") from error
