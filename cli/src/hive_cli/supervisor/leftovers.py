"""What a killed supervisor left running: it is found and ended before anything is started: nothing runs twice."""

import contextlib
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import psutil

from hive_cli.home import Home
from hive_cli.supervisor import names
from hive_cli.supervisor.state import ProcessState, read_state

PATIENCE_S = 1.0
"""For PostgreSQL, which may be about to spare itself a recovery. The others began to end in order when their
supervisor died, and would take seconds for it, in which they wait for each other. What they hold is in the log or
on the disk, or is begun again, as after their own death."""

GONE_S = 10.0
_LOOK_S = 0.01


def end_leftovers(home: Home) -> list[str]:
    """End what an earlier supervisor of this home left, and return the names. The caller holds the home's lock.

    After a killed supervisor everything ends by itself; this is for the `up` that comes sooner, and for a process
    that was stopped in its tracks.
    """
    left = {process.pid: (name, process) for name, process in (*_listed(home), *_seen(home))}
    servers = [process for name, process in left.values() if name == names.POSTGRES]
    for name, process in left.values():
        if name != names.POSTGRES:
            _kill(process)
    _wait(servers, PATIENCE_S)
    for server in servers:
        # Its children would notice at their next wait only.
        for process in (server, *_below(server)):
            _kill(process)
    _wait([process for _, process in left.values()], GONE_S)
    return sorted({name for name, _ in left.values()})


def _listed(home: Home) -> Iterator[tuple[str, psutil.Process]]:
    """Yield what the supervisor had in its list."""
    state = read_state(home)
    for entry in state.services if state else ():
        if (process := _same(entry)) is not None and not _is_gone(process):
            yield entry.name, process


def _seen(home: Home) -> Iterator[tuple[str, psutil.Process]]:
    """Yield what is run as a supervisor would: it may have died before it had it in its list."""
    for process in psutil.process_iter(["cmdline"]):
        argv = process.info["cmdline"] or []
        if (name := _name_in(argv, home)) is not None and not _is_gone(process):
            yield name, process


def _name_in(argv: list[str], home: Home) -> str | None:
    values = dict(pairwise(argv))
    if values.get("-D") == str(home.postgres_dir):
        return names.POSTGRES
    config = values.get("--config", "")
    if config == str(home.nats_config_file):
        return names.NATS
    # One that was started by hand says nothing of the pid of a supervisor.
    if values.get("--supervised", "").isdecimal() and Path(config).parent == home.config_dir:
        return Path(config).stem
    return None


def _same(entry: ProcessState) -> psutil.Process | None:
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(entry.pid) if entry.pid is not None else None
        if process is not None and abs(process.create_time() - entry.created) < 1.0:
            return process
    return None


def _below(process: psutil.Process) -> list[psutil.Process]:
    with contextlib.suppress(psutil.Error):
        return process.children(recursive=True)
    return []


def _kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.Error):
        process.kill()


def _wait(processes: list[psutil.Process], patience_s: float) -> None:
    until = time.monotonic() + patience_s
    while not all(map(_is_gone, processes)) and time.monotonic() < until:
        time.sleep(_LOOK_S)


def _is_gone(process: psutil.Process) -> bool:
    """Say whether it has ended, also where nobody has taken note of that yet.

    It is a zombie as soon as its first thread has ended, and has its ports until the last one has.
    """
    try:
        if not process.is_running():
            return True
        return process.status() == psutil.STATUS_ZOMBIE and process.num_threads() <= 1
    except psutil.Error:
        return True
