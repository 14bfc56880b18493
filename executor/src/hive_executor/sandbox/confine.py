"""What a child process gives up before it touches anything of a guest."""

import ctypes
import errno
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
# linux/sched.h
_CLONE_NEWIPC: Final = 0x08000000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWNET: Final = 0x40000000
_NOT_ALLOWED: Final = frozenset({errno.EPERM, errno.ENOSYS, errno.ENOSPC, errno.EINVAL})
_STATM = Path("/proc/self/statm")
_PAGE_BYTES: Final = resource.getpagesize()


def isolate() -> bool:
    """Move this process into a user, network and IPC namespace of its own, where the system lets it.

    Whoever breaks out of the engine then has no capability, no interface (not even loopback, where the control
    plane listens), and no shared memory of others. Call it before the first thread, and before
    `die_with_parent`, since a change of credentials can drop that request.

    Returns:
        False where there are no such namespaces, or they are not allowed (user_namespaces(7)).
    """
    if sys.platform != "linux":
        return False
    unshare = ctypes.CDLL(None, use_errno=True).unshare
    if unshare(_CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWIPC) == 0:
        return True
    number = ctypes.get_errno()
    if number not in _NOT_ALLOWED:
        raise OSError(number, "unshare failed")
    return False


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
