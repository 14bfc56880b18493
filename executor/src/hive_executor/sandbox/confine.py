"""What a child process gives up before it touches anything of a guest."""

import ctypes
import os
import resource
import select
import signal
import socket
import sys
import threading
from pathlib import Path
from typing import Final

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NO_NEW_PRIVS: Final = 38
_STATM = Path("/proc/self/statm")
_PAGE_BYTES: Final = resource.getpagesize()


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent ends, and take no new privileges. Elsewhere: nothing."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    for option, value in ((_PR_SET_PDEATHSIG, signal.SIGKILL), (_PR_SET_NO_NEW_PRIVS, 1)):
        if prctl(option, value, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), f"prctl {option} failed")
    if os.getppid() != parent:
        os._exit(1)  # it ended in between


def exit_when_closed(channel: socket.socket) -> None:
    """Watch `channel` in a thread and end the process at once when the other end closes, on every system."""
    poller = select.poll()
    poller.register(channel, 0)  # a hang-up is reported without being asked for

    def watch() -> None:
        poller.poll()
        os._exit(0)

    threading.Thread(target=watch, name="watch-parent", daemon=True).start()


def limit(**soft: int) -> None:
    """Lower resource limits, named as in `resource` without the prefix; soft and hard are set together.

    A limit that the system does not know or has lower already is left as it is.
    """
    for name, wanted in soft.items():
        kind = getattr(resource, f"RLIMIT_{name.upper()}", None)
        if kind is None:
            continue
        _, hard = resource.getrlimit(kind)
        bound = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(kind, (bound, bound))


def data_bytes() -> int | None:
    """Return the private writable memory of this process, touched or not; None where the system does not say.

    Reserved address space does not count, grown linear memory does. It is what `RLIMIT_DATA` limits.
    """
    try:
        return int(_STATM.read_bytes().split()[5]) * _PAGE_BYTES
    except FileNotFoundError:
        return None


def allow_data_growth(bytes_more: int) -> None:
    """Let this process take at most `bytes_more` of private memory from now on; only on Linux."""
    now = data_bytes()
    if now is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (now + bytes_more, hard))
