"""`python -m hive_cli.supervisor --home DIR`: the supervisor of `hive up --detach`."""

import argparse
import sys
from pathlib import Path

from rich.console import Console

from hive_cli.home import Home
from hive_cli.supervisor.progress import to_console, to_pipe
from hive_cli.supervisor.supervisor import supervise


def main() -> int:
    """Run until a signal says stop, and return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m hive_cli.supervisor", description=main.__doc__)
    parser.add_argument("--home", type=Path, required=True, help="folder of the installation")
    parser.add_argument("--executors", type=int, default=None, help="how many executors run")
    parser.add_argument("--report-fd", type=int, default=None, help="where progress goes, as JSON lines")
    arguments = parser.parse_args()
    report = to_pipe(arguments.report_fd) if arguments.report_fd is not None else to_console(Console(stderr=True))
    return supervise(Home(arguments.home), arguments.executors, report)


if __name__ == "__main__":
    sys.exit(main())
