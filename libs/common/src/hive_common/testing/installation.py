"""An installation as a user drives it: through the `hive` command, its exit codes and its JSON."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil

from hive_common.testing.faults import enter_network

HIVE = Path(sys.executable).with_name("hive")
APPROVAL_ENDS = {"ApprovalDecided", "ApprovalExpired"}
TERMINAL = {"TaskSucceeded", "TaskFailed", "TaskCancelled", "JobSucceeded", "JobFailed", "JobCancelled"}


class Installation:
    """One home. Nothing of it is patched: what happens here is what happens on a user's machine."""

    def __init__(self, home: Path, prefix: Sequence[str] = (), namespace: Path | None = None) -> None:
        """Args: `prefix` stands before every command, such as `ip netns exec NAME`; `namespace` is the file of the
        network namespace that it enters.
        """
        self.home = home
        self._namespace = namespace
        self.prefix = tuple(prefix)
        self.environment = {**os.environ, "HIVE_HOME": str(home)}

    def hive(
        self, *arguments: str, check: bool = True, timeout_s: float = 180
    ) -> "subprocess.CompletedProcess[str]":
        """Run a command to its end. With `check`, another exit code than 0 fails with what it printed."""
        done = subprocess.run(
            [*self.prefix, HIVE, *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            command = " ".join(arguments)
            said = f"{done.stdout}\n{done.stderr}\n{self.logs()}"
            raise AssertionError(f"hive {command}: exit code {done.returncode}\n{said}")
        return done

    def json(self, *arguments: str, check: bool = True, timeout_s: float = 180) -> Any:
        """Run a command with `--json` and return what it printed."""
        return json.loads(self.hive(*arguments, "--json", check=check, timeout_s=timeout_s).stdout)

    def submit(self, document: dict[str, Any], key: str = "") -> str:
        """POST a job, with the owner's key or another one, and return its id."""
        submitted = self._ask("/v1/jobs", json.dumps(document).encode(), key)
        job: str = submitted["job_id"]
        return job

    def get(self, path: str, **params: Any) -> Any:
        """GET a JSON document from the gateway, which takes a hundredth of what a command takes.

        Raises:
            urllib.error.URLError: no answer, or an error for an answer.
        """
        return self._ask(f"{path}?{urllib.parse.urlencode(params)}")

    def _ask(self, path: str, body: bytes | None = None, key: str = "") -> Any:
        endpoint = json.loads((self.home / "hive.json").read_text())["endpoints"]["http"]
        key = key or (self.home / "api-key").read_text().strip()
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        request = urllib.request.Request(endpoint + path, body, headers)  # noqa: S310 - of this home

        def ask() -> Any:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                return json.load(answer)

        if self._namespace is None:
            return ask()
        # Only this one thread moves there, and it ends with the call.
        with ThreadPoolExecutor(1) as pool:
            pool.submit(enter_network, self._namespace).result()
            return pool.submit(ask).result()

    def up(self, executors: int = 2) -> None:
        """Start, and wait until it is ready. A new home takes no ports that others may be about to take."""
        if not (self.home / "hive.json").exists():
            self.hive("init", "--free-ports", "--executors", str(executors))
        self.hive("up", "--detach", "--executors", str(executors))

    def down(self) -> None:
        """Stop everything."""
        self.hive("down")

    def start_job(self, file: Path, *arguments: str) -> "subprocess.Popen[str]":
        """Start `hive run --json` in the background."""
        command = [*self.prefix, str(HIVE), "run", str(file), "--json", *arguments]
        return subprocess.Popen(
            command, env=self.environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def state(self) -> dict[str, Any]:
        """Return what the supervisor says of itself and of what it watches; `stopped` where there is none.

        From its file, as `hive status` has it, for a hundredth of what that command takes.
        """
        try:
            said: dict[str, Any] = json.loads((self.home / "run" / "state.json").read_text())
            is_running = psutil.Process(said["supervisor_pid"]).status() != psutil.STATUS_ZOMBIE
        except (FileNotFoundError, psutil.NoSuchProcess):
            is_running = False
        return said if is_running else {"state": "stopped", "services": []}

    def pids(self) -> dict[str, int]:
        """Return the pid of every process that the supervisor watches, by name."""
        return {one["name"]: one["pid"] for one in self.state()["services"] if one["pid"]}

    def runner_pids(self) -> list[int]:
        """Return the pids of all runner processes, which executors and their keepers started."""
        found = []
        for name, pid in self.pids().items():
            if name.startswith("executor"):
                children = psutil.Process(pid).children(recursive=True)
                found += [child.pid for child in children if "hive_executor.sandbox.runner" in child.cmdline()]
        return found

    def supervised(self) -> bool:
        """Say whether a supervisor runs for this home."""
        return self.hive("status", check=False).returncode == 0

    def admin_dsn(self) -> str:
        """Return the connection string of the Postgres superuser of this home; it names a password file."""
        endpoint: str = json.loads((self.home / "hive.json").read_text())["endpoints"]["postgres"]
        return endpoint

    def supervisor_pid(self) -> int:
        """Return the pid of the supervisor: the parent of what it started."""
        gateway = psutil.Process(self.pids()["gateway"])
        return gateway.ppid()

    def processes_tree(self) -> list[psutil.Process]:
        """Return the supervisor and everything below it."""
        supervisor = psutil.Process(self.supervisor_pid())
        return [supervisor, *supervisor.children(recursive=True)]

    def kill_everything(self, tree: Iterable[psutil.Process]) -> None:
        """Send SIGKILL to `tree` (from `processes_tree`), the supervisor first, and wait until all are gone."""
        doomed = list(tree)
        for process in doomed:
            self.kill(process.pid)
        _, left = psutil.wait_procs(doomed, timeout=30)
        assert left == [], f"not killed: {left}"

    def processes(self) -> list[psutil.Process]:
        """Return every process that belongs to this home, by its command line or its working directory."""
        found = []
        for process in psutil.process_iter(["pid", "cmdline"]):
            cmdline = " ".join(process.info["cmdline"] or [])
            if str(self.home) in cmdline and process.pid != os.getpid():
                found.append(process)
        return found

    def wait_ready(self, timeout_s: float = 60) -> None:
        """Wait until every process is up again."""
        wait_until(lambda: self.state()["state"] == "ready", timeout_s, "the installation is ready")

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send a signal; a process that is gone already is fine."""
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    def events(self, job: str) -> list[dict[str, Any]]:
        """Return the events of a job and its tasks, in order."""
        return [json.loads(line) for line in self.hive("job", "events", job, "--json").stdout.splitlines()]

    def verify(self, *arguments: str) -> dict[str, Any]:
        """Ask the auditor, who is the oracle of every fault test."""
        result: dict[str, Any] = self.json("audit", "verify", *arguments, check=False)
        return result

    def logs(self, lines: int = 8) -> str:
        """Return the last lines of every log, for a failure's message."""
        tails = [
            f"--- {log.name}\n" + "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
            for log in sorted((self.home / "logs").glob("*.log"))
        ]
        return "\n".join(tails)


def wait_until(holds: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Poll until `holds` returns true; fail after `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(0.1)


def assert_exactly_once(events: Iterable[dict[str, Any]]) -> None:
    """Assert law 2: each task and the job has exactly one terminal event, and it is the last that counts."""
    terminal: Counter[str] = Counter()
    streams = set()
    for event in events:
        streams.add(event["stream"])
        terminal[event["stream"]] += event["type"] in TERMINAL | APPROVAL_ENDS
    wrong = {stream: terminal[stream] for stream in streams if terminal[stream] != 1}
    assert not wrong, f"terminal events by stream: {wrong}"
