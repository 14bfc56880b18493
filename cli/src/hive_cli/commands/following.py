"""Follows a job to its end and shows it meanwhile: a live tree on a terminal, a line now and then elsewhere."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from hive_common.kernel.errors import HiveError
from rich.console import Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.text import Text

from hive_cli.commands.drawing import Drawing, place
from hive_cli.commands.tracking import TASK_STATES, TERMINAL_STATES, Tracker
from hive_cli.output import clean, err

if TYPE_CHECKING:
    from hive_cli.api import Api

PLAIN_S = 5.0
"""Without a terminal, one line this often."""

SILENCE_S = 15.0
"""There one at least this often, though nothing happens: a model may take its time."""

QUIET_S = 3.0
"""After so long without an event, the gateway is asked whether tasks wait for a machine; again that often."""

ASKED_MAX = 20
"""Tasks of a state that it is asked about: one is told, since the others wait for the same as a rule."""

TASKS_DRAWN = 5
"""Tasks of a step that the live view draws; the others are counted."""


class Left(Exception):
    """The user pressed Ctrl-C a second time: the job ends without being watched."""


class JobView:
    """Draws a tracker.

    Args:
        title: name of the job and its id.
        executors: names of executors by id.
    """

    def __init__(self, title: str, executors: dict[str, str]) -> None:
        self.tracker = Tracker()
        self.note = ""
        self.lacks = ""
        """What tasks wait for beside their turn, as it was found when nothing had happened for a while."""
        self.heard_at = time.monotonic()
        """When there was the last event."""
        self.told = ""
        """The last line that was printed where there is no terminal, and when."""
        self.told_at = time.monotonic()
        self._title = title
        self._executors = executors
        self._lock = threading.Lock()

    def __rich__(self) -> RenderableType:
        """Render the tree (called by Rich several times a second)."""
        with self._lock:
            now_us = self.tracker.ended_us or time.time_ns() // 1000
            tree = Drawing(self.tracker, self._executors, TASKS_DRAWN, now_us).tree("")
            # First what has to be seen: a terminal shows as much of the tree as it has room for.
            # What somebody waits for in vain must not end at the edge of the terminal.
            running = Text(self._running(), style="dim", no_wrap=False, overflow="fold")
            return Group(Text(self.summary(), style="bold"), running, tree)

    def apply(self, event: dict[str, Any]) -> None:
        """Take in one event. It is drawn by a thread of Rich's, which has to wait meanwhile."""
        with self._lock:
            self.tracker.apply(event)
            self.lacks, self.heard_at = "", time.monotonic()

    def summary(self) -> str:
        """Return one line: how far it is."""
        counts = self.tracker.counts()
        ended = sum(counts[state] for state in TERMINAL_STATES)
        return f"{self._title}   {ended}/{counts.total()} tasks   {self._elapsed_s():.1f} s"

    def plain(self) -> str:
        """Return the same for a log."""
        with self._lock:
            counts = self.tracker.counts()
            states = ", ".join(f"{counts[state]} {state}" for state in TASK_STATES if counts[state])
            return f"{self.summary()}   {states}{self._failures()}{self._waiting()}"

    def _elapsed_s(self) -> float:
        """From the submit on, also where somebody looks later; a log from another clock never counts below 0."""
        tracker = self.tracker
        if not tracker.started_us:
            return 0.0
        until_us = tracker.ended_us or time.time_ns() // 1000
        return max(0, until_us - tracker.started_us) / 1e6

    def _failures(self) -> str:
        failures = self.tracker.failures
        return f"   {failures} {'attempt' if failures == 1 else 'attempts'} failed" if failures else ""

    def _waiting(self) -> str:
        waiting = list(self.tracker.waiting)
        if not waiting:
            return f"   {self.lacks}" if self.lacks else ""
        more = f" (and {len(waiting) - 1} more: hive approvals)" if len(waiting) > 1 else ""
        return f"   waits for you: hive approvals show {waiting[0]}{more}"

    def _running(self) -> str:
        busy = sorted((self._executors.get(key, key[:8]), count) for key, count in self.tracker.busy().items())
        shown = ", ".join(f"{name} runs {count}" for name, count in busy[:6])
        more = f" and {len(busy) - 6} more" if len(busy) > 6 else ""
        note = f"{self.note}   " if self.note else ""
        return f"{note}{shown + more or 'nothing runs'}{self._failures()}{self._waiting()}"


def follow(api: "Api", job_id: str, name: str) -> dict[str, Any]:
    """Watch a job until it has ended and return it. The first Ctrl-C cancels it, the second leaves.

    Raises:
        Left: it was left.
    """
    view = JobView(f"{name} {job_id}", executor_names(api))
    cancelled = False
    with _shown(view, lambda: _lacking(api, job_id)):
        while not view.tracker.ended:
            try:
                _take(api, job_id, view)
                if not view.tracker.ended:
                    break  # the stream is complete, and the last event was one that this client does not know
            except KeyboardInterrupt:
                if cancelled:
                    raise Left from None
                cancelled = True
                view.note = "cancelling; Ctrl-C again leaves it to itself"
                _cancel(api, job_id)
    return _job(api, job_id, view.tracker.position)


def _cancel(api: "Api", job_id: str) -> None:
    try:
        api.delete(f"/v1/jobs/{job_id}", reason="interrupted")
    except KeyboardInterrupt:
        raise Left from None


def _take(api: "Api", job_id: str, view: JobView) -> None:
    position = str(view.tracker.position) if view.tracker.position else ""
    for event in api.events(f"/v1/jobs/{job_id}/stream", position):
        known = len(view.tracker.waiting)
        view.apply(json.loads(event.data))
        # Nothing more comes until somebody decides, so it is said at once; and so is that it has begun.
        due = time.monotonic() - view.told_at > PLAIN_S or len(view.tracker.waiting) > known or not view.told
        if not err.is_terminal and due and view.tracker.counts():
            _tell(view)


def _tell(view: JobView) -> None:
    line = view.plain()
    if line != view.told:
        view.told, view.told_at = line, time.monotonic()
        err.print(escape(line))


def _break_silence(view: JobView, over: threading.Event, lacking: Callable[[], str]) -> None:
    """Say what only looks as if nothing happened, until it is over."""
    asked_at = view.heard_at
    while not over.wait(0.5):
        now = time.monotonic()
        if now - max(asked_at, view.heard_at) >= QUIET_S:
            heard_at, found = view.heard_at, lacking()
            asked_at = time.monotonic()
            if heard_at == view.heard_at and found != view.lacks:
                view.lacks = found
                if not err.is_terminal:
                    _tell(view)
        if not err.is_terminal and now - view.told_at >= SILENCE_S:
            view.told_at = now
            _tell(view)


def _lacking(api: "Api", job_id: str) -> str:
    try:
        # Of a task that has several attempts, some may run while others wait.
        for state in ("ready", "active"):
            for task in api.get(f"/v1/jobs/{job_id}/tasks", state=state, limit=ASKED_MAX)["tasks"]:
                if task["waits_for"]:
                    return clean(f"{place(task)} {task['waits_for']}")
    except (HiveError, RuntimeError):
        pass  # whether the gateway is there is told by the stream, which may have ended, and its client with it
    return ""


def _job(api: "Api", job_id: str, position: int) -> dict[str, Any]:
    job: dict[str, Any] = api.get(f"/v1/jobs/{job_id}", min_position=position)
    return job


@contextmanager
def _shown(view: JobView, lacking: Callable[[], str]) -> Iterator[None]:
    over = threading.Event()
    teller = threading.Thread(target=_break_silence, args=(view, over, lacking), daemon=True)
    teller.start()
    try:
        if err.is_terminal:
            with Live(view, console=err, refresh_per_second=8, transient=False):
                yield
        else:
            yield
    finally:
        over.set()
        teller.join(1.0)
    if not err.is_terminal:
        _tell(view)


def executor_names(api: "Api") -> dict[str, str]:
    """Return the names of executors by id."""
    return {one["executor_id"]: one["name"] for one in api.get("/v1/executors", limit=1000)["executors"]}


def result_of(api: "Api", job: dict[str, Any]) -> dict[str, Any]:
    """Return what `hive run --json` prints, with an output that is a blob fetched."""
    output = job.get("output")
    if job.get("output_digest"):
        output = json.loads(api.get_blob(job["output_digest"]))
    tasks = job["tasks"]
    ended_us = job["ended_us"] or time.time_ns() // 1000
    return {
        "job_id": job["job_id"],
        "state": job["state"],
        "output": output,
        "tasks": {name: tasks[name] for name in ("total", "succeeded", "failed", "cancelled")},
        "attempts": job["attempts"],
        "duration_ms": (ended_us - job["submitted_us"]) // 1000,
    }
