"""What the examples run in: an installation in a scratch home that is gone afterwards, or one that runs already."""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
HIVE = Path(sys.executable).with_name("hive")
LOG_LINES = 5
INTERRUPTED = 130
END_S = 20.0
"""How long a command that was interrupted has for its own end, such as the cancel of a job."""


def arguments(description: str) -> argparse.ArgumentParser:
    """Return a parser with the options that all examples have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--home", type=Path, help="run in this installation, which is up; else in a scratch home")
    parser.add_argument("--json", action="store_true", help="print one JSON document for programs")
    return parser


class Installation:
    """An installation as its user drives it, with the command `hive`.

    Attributes:
        scratch: nothing of it is kept.
        console: for people; with `as_json` what they see goes to stderr, and stdout is one document.
    """

    def __init__(self, home: Path, scratch: bool, as_json: bool) -> None:
        self.home, self.scratch, self.as_json = home, scratch, as_json
        self.console = Console(highlight=False, stderr=as_json)

    def hive(self, *command: str, capture: bool = False) -> str:
        """Run the command, and leave when it fails. Its progress goes to the terminal."""
        output: int | TextIO = subprocess.PIPE if capture else (sys.stderr if self.as_json else sys.stdout)
        sys.stdout.flush()
        environment = {**os.environ, "HIVE_HOME": str(self.home)}
        process = subprocess.Popen([HIVE, *command], cwd=ROOT, env=environment, stdout=output, text=True)
        try:
            said, _ = process.communicate()
        except KeyboardInterrupt:
            # Ctrl-C reached the command as well, which cancels its job; a signal to this process alone did not.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.send_signal(signal.SIGINT)
                process.communicate(timeout=END_S)
            process.kill()
            raise
        if process.returncode == INTERRUPTED:
            raise KeyboardInterrupt
        if process.returncode != 0:
            if said:
                self.console.print(said, markup=False)
            raise SystemExit(f"`hive {' '.join(command)}` ended with exit code {process.returncode}")
        return said or ""

    def ask(self, *command: str) -> Any:
        """Run a command with `--json` and return what it says."""
        return json.loads(self.hive(*command, "--json", capture=True))

    def push(self, *agents: Path) -> None:
        """Sign and publish agents, and grant what they ask for."""
        self.hive("agent", "push", *map(str, agents), "--grant")

    def run(self, job: Path, **values: Any) -> dict[str, Any]:
        """Run a job with these members of its input; return how it ended, and its output."""
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(values, file)
            file.flush()
            result: dict[str, Any] = self.ask("run", str(job), "--input-file", file.name)
        return result

    def tree(self, job_id: str, tasks: int = 4) -> None:
        """Show what became of the tasks of a job, of the first ones of each step."""
        self.console.print()
        self.hive("job", "tree", job_id, "--limit", str(tasks))

    def decision(self, task_id: str) -> None:
        """Show how a task was decided."""
        self.console.print()
        self.hive("job", "decision", task_id)

    def tasks(self, job_id: str, step: str) -> list[dict[str, Any]]:
        """Return the tasks of a step in the order of its fork, without those that judged them."""
        shown = self.ask("job", "show", job_id, "--limit", "100000")
        found = [task for task in shown["tasks"] if task["step"] == step and not task.get("judging")]
        return sorted(found, key=lambda task: task["index"] or 0)

    def finish(self, document: dict[str, Any]) -> None:
        """With `--json`, print the one document."""
        if self.as_json:
            print(json.dumps(document, ensure_ascii=False))


@contextlib.contextmanager
def installation(chosen: argparse.Namespace, *up: str, executors: int = 2) -> Iterator[Installation]:
    """Give the installation at `--home`, or start one in a scratch home; whatever happens, nothing of that stays.

    Args:
        up: further options of `hive up` for a scratch home.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if chosen.home is not None:
        with _left_quietly():
            yield Installation(chosen.home, False, chosen.json)
        return
    made = Installation(Path(tempfile.mkdtemp(prefix="hive-example-")), True, chosen.json)
    made.console.print("an installation of its own starts for this example, and is removed at its end")
    try:
        with _left_quietly():
            try:
                made.hive("init", "--free-ports", "--executors", str(executors), capture=True)
                made.hive("up", "--detach", "--executors", str(executors), *up)
            except SystemExit:
                _show_logs(made)
                raise
            yield made
    finally:
        _remove(made)


@contextlib.contextmanager
def _left_quietly() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPTED) from None


def _show_logs(made: Installation) -> None:
    for log in sorted((made.home / "logs").glob("*.log")):
        last = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
        made.console.print(f"--- {log.name}", *last, sep="\n", markup=False)


def _remove(made: Installation) -> None:
    """Stop and remove it; another Ctrl-C does not leave half of it behind."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        # In a session of its own, because a terminal sends Ctrl-C to all in the foreground.
        command = [HIVE, "down", "--home", str(made.home)]
        down = subprocess.run(command, stdout=sys.stderr, start_new_session=True, check=False)
        if down.returncode == 0:
            shutil.rmtree(made.home, ignore_errors=True)
        else:  # it may still run, and needs its files to be stopped
            made.console.print(f"it could not be stopped; try again: hive down --home {made.home}", style="red")
    finally:
        signal.signal(signal.SIGINT, before)


def files(patterns: list[str]) -> list[dict[str, str]]:
    """Return {path, text} of all files that fit, below the current folder as a shell would find them."""
    found = {path for pattern in patterns for path in _matching(pattern) if path.is_file()}
    if not found:
        raise SystemExit(f"no file fits {', '.join(patterns)} (from {Path.cwd()})")
    return [{"path": str(path), "text": path.read_text(errors="replace")} for path in sorted(found)]


def _matching(pattern: str) -> list[Path]:
    path = Path(pattern)
    if path.is_absolute():
        return list(Path(path.anchor).glob(str(path.relative_to(path.anchor))))
    return [one for one in Path().glob(pattern) if not any(part.startswith(".") for part in one.parts)]
