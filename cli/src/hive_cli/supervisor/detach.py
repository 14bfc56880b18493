"""`hive up --detach`: the supervisor in a session of its own, and its first lines here."""

import os
import signal
import subprocess
import sys

import msgspec
from hive_common.kernel.errors import Internal

from hive_cli.home import Home
from hive_cli.supervisor.logs import bound_log, log_tail
from hive_cli.supervisor.names import SUPERVISOR
from hive_cli.supervisor.progress import Report, Reporter, from_pipe
from hive_cli.supervisor.wishes import Wishes


def start_detached(home: Home, wishes: Wishes, report: Reporter) -> int:
    """Start a supervisor that outlives this process, and return its exit code or 0 once it is ready.

    Ctrl-C meanwhile stops it.

    Raises:
        OSError: the log cannot be written.
        Internal: it ended without a word.
    """
    home.logs_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
    log_file = home.log_file(SUPERVISOR)
    bound_log(log_file)
    reading, writing = os.pipe()
    command = [sys.executable, "-P", "-m", "hive_cli.supervisor", "--home", str(home.root)]
    command += ["--report-fd", str(writing), "--wishes", msgspec.json.encode(wishes).decode()]
    with log_file.open("ab") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            pass_fds=(writing,),
            start_new_session=True,
            cwd="/",
        )
    os.close(writing)
    last = _relay(reading, process, report)
    if last is not None and last.kind == "ready":
        return 0
    code = process.wait()
    if last is None or last.kind != "failed":
        raise Internal(f"the supervisor ended with code {code}; the end of {log_file}:\n{log_tail(log_file)}")
    return 1


def _relay(reading: int, process: "subprocess.Popen[bytes]", report: Reporter) -> Report | None:
    last: Report | None = None
    with os.fdopen(reading, "rb") as stream:
        lines = from_pipe(stream)
        while True:
            try:
                line = next(lines, None)
            except KeyboardInterrupt:
                process.send_signal(signal.SIGTERM)
                lines = from_pipe(stream)
                continue
            if line is None:
                return last
            report(line)
            last = line
