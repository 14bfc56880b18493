"""What a child process gives up before it touches anything of a guest."""

import ctypes
import errno
import functools
import os
import platform
import resource
import select
import signal
import socket
import struct
import sys
import threading
from pathlib import Path
from typing import Final

from hive_executor.sandbox import syscalls

NAMESPACES: Final = "namespaces"
PROCESSES: Final = "process namespace"
EMPTY_ROOT: Final = "empty root"
SYSCALL_FILTER: Final = "system call filter"
CGROUP: Final = "cgroup limits"
LAYERS: Final = (NAMESPACES, PROCESSES, EMPTY_ROOT, SYSCALL_FILTER, CGROUP)
"""What a system can add to the engine's own isolation; `python -m hive_executor.sandbox.layers` tells."""

SCRATCH: Final = "/scratch"
SCRATCH_FILES_MAX: Final = 4_096
"""Where a runner may have files, and how many with folders: names take memory that no size counts."""

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_NAME: Final = 15
_PR_SET_NO_NEW_PRIVS: Final = 38
# linux/sched.h
_CLONE_NEWNS: Final = 0x00020000
_CLONE_NEWUTS: Final = 0x04000000
_CLONE_NEWIPC: Final = 0x08000000
_CLONE_NEWUSER: Final = 0x10000000
_CLONE_NEWPID: Final = 0x20000000
_CLONE_NEWNET: Final = 0x40000000
_NAMESPACES: Final = _CLONE_NEWUSER | _CLONE_NEWNET | _CLONE_NEWNS | _CLONE_NEWIPC | _CLONE_NEWUTS
# linux/mount.h, bits/statvfs.h
_MS_RDONLY: Final = 1
_MS_NOSUID: Final = 2
_MS_NODEV: Final = 4
_MS_NOEXEC: Final = 8
_MS_REMOUNT: Final = 32
_MS_NOATIME: Final = 1024
_MS_NODIRATIME: Final = 2048
_MS_BIND: Final = 4096
_MS_REC: Final = 16384
_MS_PRIVATE: Final = 1 << 18
_MS_RELATIME: Final = 1 << 21
_MNT_DETACH: Final = 2
_ST_RELATIME: Final = 4096
_PIVOT_ROOT: Final = {"x86_64": 155, "aarch64": 41}
_CAPABILITY_VERSION_3: Final = 0x20080522
_NOT_ALLOWED: Final = frozenset(
    {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.ENOSPC, errno.EINVAL, errno.EOVERFLOW}
)
_PAGE_BYTES: Final = resource.getpagesize()


def isolate(*, processes: bool = False) -> list[str]:
    """Move this process into user, network, mount, IPC and host name namespaces of its own, where it is allowed.

    Whoever breaks out of the engine then has no interface (not even loopback, where the control plane listens),
    and no shared memory of others. Call it before the first thread, and before `die_with_parent`, since a change
    of credentials can drop that request.

    Args:
        processes: the next child is the first process of a namespace too, and sees no other but its own.

    Returns:
        The layers had by it, of `LAYERS`; none where there are no such namespaces, or they are not allowed
        (user_namespaces(7)).
    """
    if sys.platform != "linux":
        return []
    uid, gid = os.geteuid(), os.getegid()
    layers = [NAMESPACES, PROCESSES] if processes else [NAMESPACES]
    try:
        if not (processes and _unshared(_NAMESPACES | _CLONE_NEWPID)):
            layers = [NAMESPACES]
            _checked(_libc().unshare(_NAMESPACES), "unshare")
        # Without a mapping nothing can be created in the file system of the new root.
        for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            Path("/proc/self", name).write_text(text)
    except OSError as error:
        _refused(error)
        return []
    return layers


def _unshared(kinds: int) -> bool:
    try:
        _checked(_libc().unshare(kinds), "unshare")
    except OSError as error:
        return _refused(error)
    return True


def part_mounts() -> None:
    """Leave the mount namespace that this process shares with its parent, whose root would change with its own.

    Raises:
        OSError: it is not allowed, though it was before.
    """
    _checked(_libc().unshare(_CLONE_NEWNS), "unshare")


def close_off(layers: list[str], *, visible: Path | None, mount_point: Path, scratch_bytes: int = 0) -> list[str]:
    """Give up files and system calls, as far as the system can do that; after `isolate` and `die_with_parent`.

    What is open or mapped stays, but nothing can be imported any more, and no process started.

    Args:
        layers: those that this process has already.
        visible: the one folder that is still there, under its path, read-only.
        mount_point: any empty folder; it stays empty for everybody else.
        scratch_bytes: of files that can be made below `SCRATCH`, in memory that goes with the process; none with 0.
            Only there with `EMPTY_ROOT`.

    Returns:
        The layers that this process now has, in the order of `LAYERS`.
    """
    data_bytes()  # opens what it will read
    found = set(layers)
    if NAMESPACES in found and _hide_files(visible, mount_point, scratch_bytes):
        found.add(EMPTY_ROOT)
    if syscalls.restrict(writes=scratch_bytes > 0 and EMPTY_ROOT in found):
        found.add(SYSCALL_FILTER)
    return [layer for layer in LAYERS if layer in found]


def _hide_files(visible: Path | None, mount_point: Path, scratch_bytes: int) -> bool:
    """Make the root of this process an empty, read-only file system, and drop all capabilities."""
    pivot_root = _PIVOT_ROOT.get(platform.machine())
    if pivot_root is None:
        return False
    libc = _libc()
    try:
        _mount(None, Path("/"), _MS_REC | _MS_PRIVATE)
        _mount_tmpfs(mount_point, "size=64k,mode=0755")
        if visible is not None:
            target = Path(f"{mount_point}{visible.absolute()}")
            target.mkdir(parents=True)
            _mount(str(visible), target, _MS_BIND)
            _make_read_only(target)
        if scratch_bytes:
            target = Path(f"{mount_point}{SCRATCH}")
            target.mkdir()
            # Whole pages; a size of 0 would be without a limit.
            size_bytes = max(1, scratch_bytes // _PAGE_BYTES) * _PAGE_BYTES
            _mount_tmpfs(target, f"size={size_bytes},nr_inodes={SCRATCH_FILES_MAX},mode=0700")
        os.chdir(mount_point)
        # Both roots at one place, the old one on top, which then goes (pivot_root(2)).
        _checked(libc.syscall(pivot_root, b".", b"."), "pivot_root")
        _checked(libc.umount2(b".", _MNT_DETACH), "umount")
        os.chdir("/")
        _make_read_only(Path("/"))
        _checked(libc.capset(struct.pack("@Ii", _CAPABILITY_VERSION_3, 0), bytes(24)), "capset")
    except OSError as error:
        return _refused(error)
    return True


def _make_read_only(place: Path) -> None:
    # A user namespace may not take away the flags that a mount has.
    found = os.statvfs(place).f_flag
    kept = found & (_MS_NOSUID | _MS_NODEV | _MS_NOEXEC | _MS_NOATIME | _MS_NODIRATIME)
    relative = _MS_RELATIME if found & _ST_RELATIME else 0
    _mount(None, place, _MS_REMOUNT | _MS_BIND | _MS_RDONLY | kept | relative)


def _mount_tmpfs(target: Path, options: str) -> None:
    flags = _MS_NOSUID | _MS_NODEV | _MS_NOEXEC
    _mount("tmpfs", target, flags, kind=b"tmpfs", options=options.encode())


def _mount(
    source: str | None, target: Path, flags: int, kind: bytes | None = None, options: bytes | None = None
) -> None:
    name = None if source is None else os.fsencode(source)
    _checked(_libc().mount(name, os.fsencode(target), kind, ctypes.c_ulong(flags), options), f"mount {target}")


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int, what: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")


def _refused(error: OSError) -> bool:
    """Return False for what a system may not have or allow, and raise the rest."""
    if error.errno in _NOT_ALLOWED:
        return False
    raise error


def die_with_parent(with_signal: signal.Signals = signal.SIGKILL) -> None:
    """Ask Linux to signal this process when its parent ends, and take no new privileges. Elsewhere: nothing."""
    if sys.platform != "linux":
        return
    parent = os.getppid()
    for option, value in ((_PR_SET_PDEATHSIG, with_signal), (_PR_SET_NO_NEW_PRIVS, 1)):
        _checked(_libc().prctl(option, value, 0, 0, 0), f"prctl {option}")
    if os.getppid() != parent:
        os._exit(1)  # it ended in between


def rename(name: str) -> None:
    """Say in the list of processes what this one is; at most 15 bytes. Only on Linux."""
    if sys.platform == "linux":
        _checked(_libc().prctl(_PR_SET_NAME, name.encode(), 0, 0, 0), "prctl PR_SET_NAME")


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
    file = _statm()
    return None if file is None else int(os.pread(file, 256, 0).split()[5]) * _PAGE_BYTES


@functools.cache
def _statm() -> int | None:
    # Kept open, because the file is out of reach in the empty root. Each read at 0 is a fresh look.
    try:
        return os.open("/proc/self/statm", os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def allow_data_growth(bytes_more: int) -> None:
    """Let this process take at most `bytes_more` of private memory from now on; only on Linux."""
    now = data_bytes()
    if now is not None:
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)
        resource.setrlimit(resource.RLIMIT_DATA, (now + bytes_more, hard))
