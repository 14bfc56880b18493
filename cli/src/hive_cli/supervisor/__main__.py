"""`python -m hive_cli.supervisor --home DIR`: the supervisor of `hive up --detach`."""

import argparse
import sys
from pathlib import Path

import msgspec

from hive_cli.home import Home
from hive_cli.supervisor.progress import Reporter, to_console, to_pipe
from hive_cli.supervisor.supervisor import supervise
from hive_cli.supervisor.wishes import Wishes


def main() -> int:
    """Run until a signal says stop, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hive_cli.supervisor", description=main.__doc__)
    parser.add_argument("--home", type=Path, required=True, help="folder of the installation")
    parser.add_argument("--wishes", default="{}", help="what this start is to be like, as JSON")
    parser.add_argument("--report-fd", type=int, default=None, help="where progress goes, as JSON lines")
    arguments = parser.parse_args()
    wishes = msgspec.json.decode(arguments.wishes, type=Wishes)
    return supervise(Home(arguments.home), wishes, _reporter(arguments.report_fd))


def _reporter(descriptor: int | None) -> Reporter:
    if descriptor is not None:
        return to_pipe(descriptor)
    from rich.console import Console  # nobody who has a pipe needs it

    return to_console(Console(stderr=True))


if __name__ == "__main__":
    sys.exit(main())
