"""A server process of a test: started with a log file, waited for, stopped."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from hive_common.kernel.errors import Unavailable


class ServerProcess:
    """One foreground server whose output goes to a file. Without `environment` it has that of this process."""

    def __init__(self, command: list[str], log_file: Path, environment: dict[str, str] | None = None) -> None:
        self._command = command
        self._log_file = log_file
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """Process id of the running server."""
        assert self._process is not None
        return self._process.pid

    def start(self, is_ready: Callable[[], bool], timeout_s: float = 30.0) -> None:
        """Start the server and return when `is_ready` says so.

        Raises:
            Unavailable: it ended or did not get ready in time; the message carries the end of its log.
        """
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd="/",
                env=self._environment,
            )
        until = time.monotonic() + timeout_s
        while not is_ready():
            if self._process.poll() is not None or time.monotonic() > until:
                tail = self._log_file.read_text(errors="replace")[-2000:]
                self.stop(signal.SIGKILL)
                raise Unavailable(f"{self._command[0]} did not get ready; its log ends: {tail}")
            time.sleep(0.02)

    def stop(self, with_signal: signal.Signals = signal.SIGTERM, timeout_s: float = 20.0) -> None:
        """Send `with_signal` and wait; SIGKILL if it is not gone by then. Does nothing when it is not running."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        process.send_signal(with_signal)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
