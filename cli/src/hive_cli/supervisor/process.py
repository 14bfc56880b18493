"""One watched process: started, asked for its health, restarted when it dies, stopped in time."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from hive_cli.supervisor.logs import bound_log
from hive_cli.supervisor.probes import Answer, Probe, Probed
from hive_cli.supervisor.state import ProcessState, created_at

log = logging.getLogger(__name__)

BACKOFF_FIRST_S = 0.1
BACKOFF_MAX_S = 5.0
HEALTHY_S = 2.0
"""A process that was ready for so long is restarted at once again."""

READY_S = 90.0
STOP_S = 10.0
START_SILENCE_S = 60.0
PROBE_START_S = 0.1
PROBE_UNREADY_S = 0.25
PROBE_S = 2.0
LOG_CHECK_S = 30.0
CANNOT_START = 127


class Final(NamedTuple):
    """Why a process that ended is not started again: it would only end in the same way, for ever."""

    state: str
    problem: str


EXECUTOR_FINALS: Mapping[int, Final] = {
    3: Final("superseded", "a newer session of this executor runs elsewhere"),
    4: Final("revoked", "this executor was revoked, for ever; to come back, this machine has to join anew"),
}
"""Exit codes of executors after which another start is useless."""


@dataclass(frozen=True)
class ProcessSpec:
    """How to run one process.

    Attributes:
        command: its argv, without secrets.
        probe: asks for its health.
        stop_signal: asks it to end.
        silence_s: how long it may stay without an answer before it is killed and started anew.
        unready_s: how long it may call itself unready before the same happens, while it starts at least
            `START_SILENCE_S`; None is for ever.
        ready_s: how long a start of everything waits until this one is ready.
        essential: a start fails without it; else one that runs but is not ready is only pointed out.
        hopeless: part of what it says of itself when waiting until it is ready is in vain.
        finals: exit codes after which it must not be started again.
        before_start: awaited before each start.
    """

    name: str
    command: list[str]
    log_file: Path
    probe: Probe
    stop_signal: signal.Signals = signal.SIGTERM
    silence_s: float = 15.0
    unready_s: float | None = None
    ready_s: float = READY_S
    essential: bool = True
    hopeless: str = ""
    finals: Mapping[int, Final] = field(default_factory=dict)
    before_start: Callable[[], Awaitable[None]] | None = None
    environment: dict[str, str] = field(default_factory=dict)


class Child:
    """A process and what keeps it running.

    Everything happens in one event loop on the main thread: Linux sends the parent-death signal when the
    *thread* that started a process ends.

    Args:
        spec: what to run.
        on_change: called after each change of state.
        on_restart: called with one sentence when the process had ended although nobody asked it to.
        on_final: called when it is not started again.
    """

    def __init__(
        self,
        spec: ProcessSpec,
        on_change: Callable[[], None],
        on_restart: Callable[[str], None],
        on_final: Callable[["Child"], None] = lambda _: None,
    ) -> None:
        self.spec = spec
        self.final: Final | None = None
        """Set once it has ended for good."""
        self.restarts = 0
        self.exits: list[int] = []
        self.is_ready = asyncio.Event()
        self.has_ended = asyncio.Event()
        self._state = "starting"
        self._problem = ""
        self._created = 0.0
        self._told: tuple[str, int | None] = ("", None)
        self._on_change = on_change
        self._on_restart = on_restart
        self._on_final = on_final
        self._stopping = asyncio.Event()
        self._released = asyncio.Event()
        self._ready_since: float | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """Pid while the process runs."""
        process = self._process
        return process.pid if process is not None and process.returncode is None else None

    def snapshot(self) -> ProcessState:
        """Return what `hive status` shows."""
        return ProcessState(self.spec.name, self._state, self.pid, self.restarts, self._created, self._problem)

    def start(self, *, held: bool = False) -> asyncio.Task[None]:
        """Start it, and keep it running until `stop`. The task fails only where a start is impossible.

        Args:
            held: one of our own processes loads its code, and begins with `release`.
        """
        if not held:
            self._released.set()
        self._task = asyncio.create_task(self._keep_running(), name=self.spec.name)
        return self._task

    def release(self) -> None:
        """Let a process that was held begin."""
        self._released.set()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()

    async def stop(self, patience_s: float = STOP_S) -> None:
        """Ask it to end, wait, and kill it when it does not."""
        self._stopping.set()
        if self.pid is not None:
            self.send(self.spec.stop_signal)
        if self._task is None:
            return
        done, _ = await asyncio.wait({self._task}, timeout=patience_s)
        if not done:
            log.warning("%s did not end within %g s, killed", self.spec.name, patience_s)
            self.send(signal.SIGKILL)
            await asyncio.wait({self._task})
        if not self._task.cancelled() and (error := self._task.exception()) is not None:
            log.error("%s failed", self.spec.name, exc_info=error)

    def send(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def _keep_running(self) -> None:
        backoff_s = BACKOFF_FIRST_S
        try:
            while not self._stopping.is_set():
                self._ready_since = None
                try:
                    code = await self._run_once()
                except OSError as error:
                    # A full disk, or no process to be had: it may pass, like the death of the process.
                    log.warning("%s cannot be started: %s", self.spec.name, error)
                    code = CANNOT_START
                self.exits.append(code)
                self.is_ready.clear()
                self.has_ended.set()
                if self._stopping.is_set():
                    break
                self.final = self.spec.finals.get(code)
                if self.final is not None:
                    self._change(*self.final)
                    self._on_final(self)
                    return
                if self._was_healthy():
                    backoff_s = BACKOFF_FIRST_S
                self.restarts += 1
                self._change("restarting", f"ended with {describe_exit(code)}")
                self._on_restart(f"{self.spec.name} ended with {describe_exit(code)}; it is started again")
                await self._pause(backoff_s)
                backoff_s = min(backoff_s * 2, BACKOFF_MAX_S)
        finally:
            self.has_ended.set()
        self._change("stopped", "")

    def _was_healthy(self) -> bool:
        return self._ready_since is not None and time.monotonic() - self._ready_since >= HEALTHY_S

    async def _pause(self, seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()

    async def _run_once(self) -> int:
        if self.spec.before_start is not None:
            await self.spec.before_start()
            if self._stopping.is_set():
                return 0
        bound_log(self.spec.log_file)
        with self.spec.log_file.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *self.spec.command,
                stdin=asyncio.subprocess.DEVNULL if self._released.is_set() else asyncio.subprocess.PIPE,
                stdout=output,
                stderr=asyncio.subprocess.STDOUT,
                cwd="/",
                env={**os.environ, **self.spec.environment},
                # Ctrl-C on the terminal is for the supervisor, which stops its processes in order.
                start_new_session=True,
            )
        self._process = process
        self._created = created_at(process.pid)
        self._change("starting", "")
        if self._released.is_set():
            self.release()  # it may have been meanwhile
        watch = asyncio.create_task(self._watch(process))
        try:
            return await process.wait()
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)

    async def _watch(self, process: asyncio.subprocess.Process) -> None:
        await self._released.wait()
        answered_at = ready_at = log_checked_at = time.monotonic()
        has_answered = has_been_ready = False
        while True:
            probed = await self.spec.probe()
            now = time.monotonic()
            if probed.answer is not Answer.SILENT:
                answered_at, has_answered = now, True
            if probed.answer is Answer.READY:
                ready_at, has_been_ready = now, True
            self._note(probed, has_been_ready)
            silence_s = self.spec.silence_s if has_answered else START_SILENCE_S
            too_long = self._overdue(now - answered_at, silence_s, now - ready_at, has_been_ready)
            if too_long:
                log.warning("%s %s (%s): killed", self.spec.name, too_long, probed.problem)
                self.send(signal.SIGKILL)
                return
            if now - log_checked_at > LOG_CHECK_S:
                bound_log(self.spec.log_file)
                log_checked_at = now
            await asyncio.sleep(_pause_after(probed.answer, has_been_ready))

    def _overdue(self, silent_s: float, silence_max_s: float, unready_s: float, has_been_ready: bool) -> str:
        if silent_s > silence_max_s:
            return f"has not answered for {silent_s:.0f} s"
        unready_max_s = self.spec.unready_s
        if unready_max_s is not None and unready_s > max(unready_max_s, 0 if has_been_ready else START_SILENCE_S):
            return f"has not been ready for {unready_s:.0f} s"
        return ""

    def _note(self, probed: Probed, has_been_ready: bool) -> None:
        if probed.answer is Answer.READY:
            if self._ready_since is None:
                self._ready_since = time.monotonic()
            self._change("ready", "")
            self.is_ready.set()
        elif has_been_ready:
            self._change(probed.answer.value, probed.problem)
        else:
            self._change("starting", probed.problem)

    def _change(self, state: str, problem: str) -> None:
        is_news = (state, self.pid) != self._told
        self._state, self._problem = state, problem
        if is_news:
            self._told = (state, self.pid)
            self._on_change()


def _pause_after(answer: Answer, has_been_ready: bool) -> float:
    """Return how soon to ask again: others wait for one that is not ready."""
    if not has_been_ready:
        return PROBE_START_S
    return PROBE_S if answer is Answer.READY else PROBE_UNREADY_S


def describe_exit(code: int) -> str:
    """Say how a process ended, from its return code as subprocess gives it."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return f"signal {signal.Signals(-code).name}"
    except ValueError:
        return f"signal {-code}"
