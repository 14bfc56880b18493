"""Groups of processes whose memory and number the kernel bounds (cgroups(7)), where this process may make some.

A runner gets a group of its own. Who makes one removes it: the runner's keeper, or else the executor, or else the
next pool that starts in the same place (`sweep`), whatever was killed in between.
"""

import contextlib
import errno
import itertools
import os
import signal
from pathlib import Path
from typing import Final, NamedTuple

_PREFIX: Final = "hive-"
_CONTROLLERS: Final = frozenset({"memory", "pids"})
_MEMORY_FILE: Final = {1: "memory.limit_in_bytes", 2: "memory.max"}
_OOM_FILE: Final = {1: "memory.oom_control", 2: "memory.events"}
# What systemd marks a unit with whose groups are its own to manage (systemd, "Control Group APIs and Delegation").
_DELEGATED: Final = ("trusted.delegate", "user.delegate")
_SYSTEMD: Final = Path("/run/systemd/system")
_numbers = itertools.count()


class Place(NamedTuple):
    """Where groups can be made: one folder in version 2, one for each controller in version 1."""

    version: int
    folders: tuple[Path, ...]

    def new_group(self, *, memory_bytes: int, processes: int) -> "Group":
        """Make a group whose members hold at most so much memory, and are at most so many threads.

        Raises:
            OSError: it is not allowed after all.
        """
        name = f"{_PREFIX}{_creator(os.getpid())}-{next(_numbers)}"
        group = Group(self.version, tuple(folder / name for folder in self.folders))
        try:
            for folder in group.folders:
                folder.mkdir()
            group.write("pids.max", processes)
            group.limit_memory(memory_bytes)
            # Version 1 counts no swap unless the kernel was told to at boot.
            with contextlib.suppress(FileNotFoundError):
                group.write("memory.swap.max", 0)
        except OSError:
            group.remove()
            raise
        return group

    def sweep(self) -> bool:
        """Remove the groups of processes that are no more, and who is still in them; say whether that is done."""
        found = (folder for parent in self.folders for folder in parent.glob(f"{_PREFIX}*-*-*"))
        left = [Group(self.version, (folder,)) for folder in found if not _lives(folder.name)]
        return not [group for group in left if not group.clear()]


class Group:
    """One group. It can be removed when nobody is in it."""

    def __init__(self, version: int, folders: tuple[Path, ...]) -> None:
        self.folders = folders
        self._version = version
        self._memory_bytes = 0

    def write(self, name: str, value: int) -> None:
        """Write to the file `name` of whichever folder has it.

        Raises:
            OSError: the kernel refuses the value, or none has it.
        """
        folder = next((one for one in self.folders if (one / name).exists()), self.folders[0])
        # Not `write_text`: a file that is missing must not be made.
        door = os.open(folder / name, os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(door, str(value).encode())
        finally:
            os.close(door)

    def limit_memory(self, bytes_max: int) -> None:
        """Set what the members may hold together; it costs nothing when it is so already.

        Raises:
            OSError: the kernel refuses.
        """
        if bytes_max != self._memory_bytes:
            self.write(_MEMORY_FILE[self._version], bytes_max)
            self._memory_bytes = bytes_max

    def enter(self, pid: int) -> None:
        """Move a process in.

        Raises:
            OSError: the kernel refuses.
        """
        for folder in self.folders:
            door = os.open(folder / "cgroup.procs", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.write(door, str(pid).encode())
            finally:
                os.close(door)

    def pids(self) -> set[int]:
        """Return who is in it, as this process sees them."""
        found: set[int] = set()
        for folder in self.folders:
            with contextlib.suppress(OSError):
                found.update(map(int, (folder / "cgroup.procs").read_text().split()))
        return found - {0}

    def killed_for_memory(self) -> int:
        """Return how many members the kernel has killed because they were over the limit together."""
        for folder in self.folders:
            with contextlib.suppress(OSError):
                words = (folder / _OOM_FILE[self._version]).read_text().split()
                return int(dict(zip(words[::2], words[1::2], strict=False)).get("oom_kill", "0"))
        return 0

    def remove(self) -> bool:
        """Remove it; say whether that is done. It stays while somebody is in it, who may just be ending."""
        is_busy = False
        for folder in self.folders:
            try:
                folder.rmdir()
            except OSError as error:
                is_busy = is_busy or error.errno == errno.EBUSY
        return not is_busy

    def clear(self) -> bool:
        """Kill who is left, and remove it; say whether that is done."""
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        return self.remove()


def group_of(folders: list[Path]) -> Group:
    """Return the group that another process has made, to be entered and removed."""
    return Group(2 if (folders[0] / "cgroup.type").exists() else 1, tuple(folders))


def find_place(proc: Path = Path("/proc/self")) -> Place | None:
    """Return where a process may make groups with limits of memory and processes; None where it may not.

    Below its own group, or beside it where a systemd unit was delegated with a subgroup for its processes.

    Args:
        proc: the folder of the process; only its files `cgroup` and `mountinfo` are read.
    """
    try:
        own = (proc / "cgroup").read_text()
        mounts = (proc / "mountinfo").read_text()
    except OSError:
        return None
    membership = dict(line.split(":", 2)[1:] for line in own.splitlines())
    found = _version_2(membership.get("", ""), mounts)
    return found or _version_1(membership, mounts)


def _version_2(own: str, mounts: str) -> Place | None:
    folder, top = _folder_of(own, mounts, "cgroup2", None)
    if folder is None:
        return None
    for candidate in (folder, folder.parent) if folder != top else (folder,):
        if _is_ours(candidate) and _has_controllers(candidate):
            return Place(2, (candidate,))
    return None


def _has_controllers(folder: Path) -> bool:
    """Say whether groups below have the controllers, and enable them if that is all that is missing."""
    try:
        if not set((folder / "cgroup.controllers").read_text().split()) >= _CONTROLLERS:
            return False
        enabled = folder / "cgroup.subtree_control"
        if not set(enabled.read_text().split()) >= _CONTROLLERS:
            # Refused while processes are in `folder` itself, unless it is the root.
            enabled.write_text("+memory +pids")
    except OSError:
        return False
    return True


def _version_1(membership: dict[str, str], mounts: str) -> Place | None:
    folders = []
    for controller in sorted(_CONTROLLERS):
        own = next((path for names, path in membership.items() if controller in names.split(",")), "")
        folder, _ = _folder_of(own, mounts, "cgroup", controller)
        if folder is None or not _is_ours(folder):
            return None
        if folder not in folders:
            folders.append(folder)
    return Place(1, tuple(folders))


def _folder_of(own: str, mounts: str, kind: str, controller: str | None) -> tuple[Path | None, Path | None]:
    """Return where the group `own` is seen in the file system, and the mount it is in (proc_pid_mountinfo(5))."""
    for line in mounts.splitlines() if own else ():
        left, _, right = line.partition(" - ")
        root, place = left.split()[3:5]
        fstype, _, options = right.split(" ", 2)
        if fstype != kind or (controller is not None and controller not in options.split(",")):
            continue
        if own == root or own.startswith(root.rstrip("/") + "/"):
            mounted = Path(place)
            return mounted / own[len(root.rstrip("/")) :].lstrip("/"), mounted
    return None, None


def _is_ours(folder: Path) -> bool:
    if not os.access(folder, os.W_OK):
        return False
    if not _SYSTEMD.exists():
        return True
    for name in _DELEGATED:
        with contextlib.suppress(OSError):
            if os.getxattr(folder, name) == b"1":
                return True
    return False


def _creator(pid: int) -> str:
    """Return what no later process with the same number has too."""
    return f"{pid}-{Path(f'/proc/{pid}/stat').read_text().rpartition(')')[2].split()[19]}"


def _lives(name: str) -> bool:
    pid, start, _ = name.removeprefix(_PREFIX).split("-", 2)
    try:
        return _creator(int(pid)) == f"{pid}-{start}"
    except (OSError, ValueError, IndexError):
        return False
