"""Runs a foreign server so that it ends when the supervisor does, however that ends.

    python -m hive_cli.supervisor.leash SIGNAL -- PROGRAM ARGUMENT…

Linux does this itself (PR_SET_PDEATHSIG, see `hive_common.ops.embedded`). Elsewhere this small process stays
in between: it watches its parent's pid, passes signals on, and ends with the exit code of the program.
"""

import os
import signal
import subprocess
import sys

POLL_S = 0.5
GRACE_S = 5.0
_PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def leashed(signal_name: str, command: list[str]) -> list[str]:
    """Return the argv that runs `command` on a leash.

    Args:
        signal_name: what the program gets when the parent is gone, such as `SIGINT`.
        command: the program and its arguments.
    """
    return [sys.executable, "-P", "-m", "hive_cli.supervisor.leash", signal_name, "--", *command]


def hold(signal_name: str, command: list[str]) -> int:
    """Run `command` until it ends or the parent is gone, and return its exit code (128 + n after signal n)."""
    parent = os.getppid()
    child = subprocess.Popen(command)
    for number in _PASSED_ON:
        signal.signal(number, lambda received, _frame: child.send_signal(received))
    while os.getppid() == parent:
        try:
            return _code(child.wait(POLL_S))
        except subprocess.TimeoutExpired:
            continue
    child.send_signal(signal.Signals[signal_name])
    try:
        return _code(child.wait(GRACE_S))
    except subprocess.TimeoutExpired:
        child.kill()
        return _code(child.wait())


def _code(returned: int) -> int:
    return returned if returned >= 0 else 128 - returned


def main(arguments: list[str]) -> int:
    """Entry point. Returns 2 for arguments that do not fit."""
    if len(arguments) < 3 or arguments[1] != "--" or arguments[0] not in signal.Signals.__members__:
        sys.stderr.write("usage: python -m hive_cli.supervisor.leash SIGNAL -- PROGRAM ARGUMENT...\n")
        return 2
    return hold(arguments[0], arguments[2:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
