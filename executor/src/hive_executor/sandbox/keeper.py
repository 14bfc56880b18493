"""The process between an executor and its runner: the first in a process namespace has to be somebody's child.

It does nothing but wait. When the runner ends it removes what the runner had and ends too; when it is told to, or
the executor has gone however that happened, it kills the runner first. It never sees anything of a guest.
"""

import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from hive_executor.sandbox import confine
from hive_executor.sandbox.cgroups import Group, group_of

_SIGNALS: Final = {signal.SIGTERM, signal.SIGCHLD}
_NAME: Final = "hive-keeper"


class Kept(NamedTuple):
    """What a runner is: its number outside, which it cannot find out itself, and the layers it has so far."""

    pid: int
    layers: list[str]


def separate(folders: Sequence[Path]) -> Kept:
    """Leave the namespaces of the executor, and fork where that takes it; to be called before the first thread.

    Returns in the runner, which dies with the keeper. The keeper stays, and does not return.

    Args:
        folders: those of the group that the runner is to be in, made by the executor; none for no group.
    """
    layers = confine.isolate(processes=True)
    if not folders and confine.PROCESSES not in layers:
        confine.die_with_parent()
        return Kept(os.getpid(), layers)
    group = group_of(list(folders)) if folders else None
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    confine.die_with_parent(signal.SIGTERM)
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(reader)
        _stay(child, group, writer)
    os.close(writer)
    if confine.NAMESPACES in layers:
        confine.part_mounts()
    confine.die_with_parent()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    pid, _, is_in_group = os.read(reader, 64).partition(b" ")
    # The pipe closes with the keeper: it may have gone before the request to die with it was made.
    poller = select.poll()
    poller.register(reader, 0)
    if not pid or poller.poll(0):
        os._exit(1)
    os.close(reader)
    return Kept(int(pid), [*layers, confine.CGROUP] if is_in_group == b"1" else layers)


def _stay(child: int, group: Group | None, pipe: int) -> None:
    status = 1
    try:
        confine.rename(_NAME)
        is_in_group = group is not None and _enter(group, child)
        # The runner's end of its channel must close with the runner, and nothing be written to it from here.
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 0)
        os.write(pipe, f"{child} {int(is_in_group)}".encode())
        status = _wait(child)
        if group is not None:
            if killed := group.killed_for_memory():
                print(f"the kernel killed {killed} process over the memory limit of its cgroup", file=sys.stderr)
            group.clear()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _enter(group: Group, child: int) -> bool:
    try:
        group.enter(child)
    except OSError as error:
        print(f"the runner cannot be moved into its cgroup: {error}", file=sys.stderr)
        return False
    return True


def _wait(child: int) -> int:
    """Return how the runner ended, as an exit code."""
    while True:
        if signal.sigwait(_SIGNALS) == signal.SIGTERM:
            os.kill(child, signal.SIGKILL)
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status) & 0xFF
