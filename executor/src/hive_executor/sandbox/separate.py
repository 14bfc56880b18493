"""How a runner leaves what its executor is in, and gets the keeper that waits for it."""

import os
import select
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple, NoReturn

from hive_executor.sandbox import confine, keeper
from hive_executor.sandbox.cgroups import Group, group_of

_SIGNALS: Final = {signal.SIGTERM, signal.SIGCHLD}


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


def _stay(child: int, group: Group | None, pipe: int) -> NoReturn:
    """Become the keeper, which is a program of its own because it then holds almost no memory."""
    try:
        is_in_group = group is not None and _enter(group, child)
        os.write(pipe, f"{child} {int(is_in_group)}".encode())
        os.set_inheritable(pipe, True)
        # The runner's end of its channel must close with the runner.
        os.dup2(os.open(os.devnull, os.O_RDWR), 0)
        folders = map(str, group.folders) if group is not None else ()
        os.execv(sys.executable, [sys.executable, "-I", "-S", keeper.__file__, str(child), *folders])  # noqa: S606
    finally:
        os._exit(1)


def _enter(group: Group, child: int) -> bool:
    try:
        group.enter(child)
    except OSError as error:
        print(f"the runner cannot be moved into its cgroup: {error}", file=sys.stderr, flush=True)
        return False
    return True
