"""Start and stop of a process: arguments, signals, the leash to its supervisor, and the exit code."""

import argparse
import asyncio
import contextlib
import ctypes
import gc
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from typing import TypeVar

from hive_common.kernel.errors import HiveError
from hive_common.ops.config import load_config
from hive_common.ops.logs import configure_logging

log = logging.getLogger(__name__)
C = TypeVar("C")

_PR_SET_PDEATHSIG = 1
_LEASH_POLL_S = 0.5

COLLECT_ALLOCATIONS = 10_000
"""Objects that are new between two looks of the garbage collector. A service makes thousands for every batch and
frees nearly all of them by reference counts; 700, the interpreter's setting, took 4 to 7 % of a service's CPU."""


def die_with_parent(signal_number: int) -> None:
    """Ask Linux to send this process `signal_number` when its parent dies (prctl(2), PR_SET_PDEATHSIG).

    Elsewhere it does nothing; `Stop` watches the parent's pid there.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal_number, 0, 0, 0)


class Stop:
    """Set once, by a signal, by the death of the supervisor, or by the service itself when it cannot go on."""

    def __init__(self) -> None:
        self._event = asyncio.Event()
        self.exit_code = 0
        self.reason = ""

    def set(self, reason: str, exit_code: int = 0) -> None:
        """Ask for the end. The first reason and the first code that is not 0 stand."""
        self.reason = self.reason or reason
        self.exit_code = self.exit_code or exit_code
        self._event.set()

    def is_set(self) -> bool:
        """Say whether the end was asked for."""
        return self._event.is_set()

    async def wait(self) -> None:
        """Return once the end was asked for."""
        await self._event.wait()

    def guard(self, task: asyncio.Task[None]) -> None:
        """End the process, with code 1, when a background task of it fails."""

        def done(finished: asyncio.Task[None]) -> None:
            if finished.cancelled():
                return
            error = finished.exception()
            if error is not None:
                log.error("%s failed", finished.get_name(), exc_info=error)
                self.set(f"{finished.get_name()} failed: {error}", 1)

        task.add_done_callback(done)


def _until_released() -> None:
    """Wait until standard input ends. A signal ends the process meanwhile, as nothing is open yet."""
    while os.read(0, 4_096):
        pass


async def _watch_parent(parent: int, stop: Stop) -> None:
    while os.getppid() == parent:
        await asyncio.sleep(_LEASH_POLL_S)
    stop.set("the supervisor is gone")


async def _run(main: Callable[[C, Stop], Awaitable[None]], config: C, parent: int | None) -> int:
    stop = Stop()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set, signal.Signals(number).name)
    leash = asyncio.create_task(_watch_parent(parent, stop)) if parent is not None else None
    try:
        await main(config, stop)
    finally:
        if leash is not None:
            leash.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await leash
    log.info("stopped: %s", stop.reason or "done")
    return stop.exit_code


def run_process(name: str, kind: type[C], main: Callable[[C, Stop], Awaitable[None]]) -> None:
    """Run a service from the command line and exit.

    Args:
        name: for logs and `--help`.
        kind: type of its configuration, a frozen msgspec struct with `log_level`.
        main: starts everything, returns after `stop` was set and everything is closed.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {name}", description=f"HiveFabric {name}")
    parser.add_argument("--config", required=True, help="JSON configuration file")
    parser.add_argument(
        "--supervised",
        type=int,
        nargs="?",
        const=os.getppid(),
        metavar="PID",
        help="stop when the parent process dies, which is this one",
    )
    parser.add_argument("--held", action="store_true", help="load everything, and begin once standard input ends")
    arguments = parser.parse_args()
    parent: int | None = arguments.supervised
    try:
        config = load_config(arguments.config, kind)
    except HiveError as error:
        parser.exit(2, f"{name}: {error.message}\n")
    configure_logging(name, getattr(config, "log_level", "INFO"))
    if parent is not None:
        die_with_parent(signal.SIGTERM)
    # Modules and what they made stay for ever: no collection has to walk through them.
    gc.collect()
    gc.freeze()
    gc.set_threshold(COLLECT_ALLOCATIONS, 20, 20)
    if arguments.held:
        _until_released()
    if parent is not None and os.getppid() != parent:
        # It died before Linux was asked to tell, and nobody would ever end this process.
        log.info("stopped: the supervisor is gone")
        sys.exit(0)
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            code = runner.run(_run(main, config, parent))
    except HiveError as error:
        log.error("%s", error.message, exc_info=error)
        code = 1
    sys.exit(code)


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes uvloop's event loops, or None where there is no uvloop."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
