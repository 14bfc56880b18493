"""Starts processes, keeps them running, and stops them in order: what every kind of home has in common."""

import asyncio
import contextlib
import logging
import os
import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable

from hive_common.kernel.errors import DeadlineExceeded, FailedPrecondition, HiveError

from hive_cli.home import Home, find_home
from hive_cli.supervisor import names
from hive_cli.supervisor.logs import log_tail, readable
from hive_cli.supervisor.process import Child, ProcessSpec, describe_exit
from hive_cli.supervisor.progress import Report, Reporter
from hive_cli.supervisor.state import InstallationState, write_state

log = logging.getLogger(__name__)

TRIES = 3
SAVE_AGAIN_S = 1.0
BAD_CONFIGURATION = 2
"""Exit code of a service that cannot read its configuration: trying again does not help."""


class Running(ABC):
    """Processes that start and end together.

    Args:
        home: provisioned and locked.
        report: gets the lines for the user.
    """

    def __init__(self, home: Home, report: Reporter) -> None:
        self._home = home
        self._report = report
        self._children: dict[str, Child] = {}
        self._state = "starting"
        self._stop = asyncio.Event()
        self._failure = ""
        self._save_again: asyncio.TimerHandle | None = None

    @abstractmethod
    async def _start(self) -> str:
        """Start everything, and return what to tell the user once it is ready."""

    @abstractmethod
    def _stop_order(self) -> Iterable[list[str]]:
        """Yield the names of processes that are stopped together, one group after the other."""

    def _ended_for_good(self, child: Child) -> None:
        """Hear of a process that is not started again, because it would only end in the same way."""
        problem = f"{child.spec.name}: {child.snapshot().problem}"
        log.warning("%s", problem)
        if self._state == "ready":
            self._report(Report("note", problem))

    async def run(self) -> int:
        """Start everything, watch it, and return once everything has ended."""
        self._handle_signals()
        code = 1
        starting = asyncio.create_task(self._start())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait({starting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if self._failure or not starting.done():
                why = self._failure or "stopped before everything was ready"
                self._report(Report("failed", why))
            elif (error := starting.exception()) is not None:
                self._report(Report("failed", self._explain(error)))
            else:
                self._report(Report("ready", starting.result()))
                self._state = "ready"
                self._save()
                await stopping
                code = self._ended()
        finally:
            for task in (starting, stopping):
                task.cancel()
            await asyncio.gather(starting, stopping, return_exceptions=True)
            await self._shut_down()
        return code

    def _ended(self) -> int:
        """Say why this ends without having been asked to, where that is so, and return the exit code."""
        if not self._failure:
            return 0
        self._report(Report("failed", self._failure))
        return 1

    def _option(self) -> str:
        """Return what commands need behind them to mean this home, where they do not by themselves."""
        return "" if find_home(None).root == self._home.root else f" --home {self._home.root}"

    def _add(self, spec: ProcessSpec) -> Child:
        child = self._plan(spec)
        child.start()
        return child

    def _plan(self, spec: ProcessSpec) -> Child:
        """Take a process up among the others, without starting it."""
        child = Child(spec, self._save, self._on_restart, self._ended_for_good)
        self._children[spec.name] = child
        return child

    def _on_restart(self, text: str) -> None:
        log.warning("%s", text)
        if self._state != "stopping":
            self._report(Report("note", text))

    async def _ready(self, child: Child, title: str) -> None:
        """Wait until a process is ready, or has ended for good, and say so.

        Raises:
            FailedPrecondition: it ended too often, or cannot read its configuration.
            DeadlineExceeded: it took too long.
        """
        name = child.spec.name
        until = time.monotonic() + child.spec.ready_s
        while not child.is_ready.is_set():
            if child.final is not None:
                self._report(Report("note", f"{name}: {child.final.problem}"))
                return
            if len(child.exits) >= TRIES or BAD_CONFIGURATION in child.exits:
                how = describe_exit(child.exits[-1])
                raise FailedPrecondition(f"{name} does not start: {how}{self._tail(name)}")
            said = child.snapshot().problem
            in_vain = bool(child.spec.hopeless) and child.spec.hopeless in said
            if in_vain or time.monotonic() > until:
                problem = f"{name} is not ready{'' if in_vain else f' after {child.spec.ready_s:g} s'}: {said}"
                if not child.spec.essential and child.pid is not None:
                    self._report(Report("note", problem))
                    return
                raise DeadlineExceeded(problem + self._tail(name))
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.1):
                    await child.is_ready.wait()
        self._report(Report("done", title))

    def _explain(self, error: BaseException) -> str:
        import psycopg

        while isinstance(error, BaseExceptionGroup):
            error = error.exceptions[0]
        match error:
            case HiveError():
                return error.message
            case psycopg.Error():
                return f"{names.POSTGRES}: {str(error).strip()}{self._tail(names.POSTGRES)}"
            case OSError():
                return f"{error.filename or self._home.root}: {error.strerror or error}"
        raise error

    def _tail(self, name: str) -> str:
        file = self._home.log_file(name)
        lines = readable(log_tail(file).splitlines())
        return f"\nthe end of {file}:\n" + "\n".join(f"  {line}" for line in lines) if lines else ""

    def _handle_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal, number)

    def _on_signal(self, number: signal.Signals) -> None:
        if not self._stop.is_set():
            log.info("stopping: %s", number.name)
            self._stop.set()
        elif number == signal.SIGINT:
            log.warning("second Ctrl-C: everything is killed")
            for child in self._children.values():
                child.send(signal.SIGKILL)

    async def _shut_down(self) -> None:
        """Stop in the order in which nothing is missed by what still runs: doors first, the truth last."""
        self._state = "stopping"
        self._save()
        for group in self._stop_order():
            await asyncio.gather(*(self._children[name].stop() for name in group if name in self._children))
        self._state = "stopped"
        self._save()

    def _save(self) -> None:
        """Write down how everything stands; where that fails, again until it works.

        The next change may be days away, and until then everybody would be told what was before.
        """
        if self._save_again is not None:
            self._save_again.cancel()
            self._save_again = None
        services = tuple(child.snapshot() for child in self._children.values())
        state = self._state
        if state == "ready" and any(service.state != "ready" for service in services):
            state = "degraded"
        if not write_state(self._home, InstallationState(state, os.getpid(), services)):
            self._save_again = asyncio.get_running_loop().call_later(SAVE_AGAIN_S, self._save)
