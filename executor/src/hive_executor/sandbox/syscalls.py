"""A filter that leaves a process only the system calls that running or compiling a guest needs (seccomp(2))."""

import ctypes
import errno
import os
import platform
import struct
import sys
from typing import Final

# linux/seccomp.h, linux/filter.h, linux/audit.h
_SET_MODE_FILTER: Final = 1
_TSYNC: Final = 1
_ALLOW: Final = 0x7FFF0000
_KILL_PROCESS: Final = 0x80000000
_ERRNO: Final = 0x00050000
_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_IF_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_IF_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06
_NUMBER_AT: Final = 0
_ARCH_AT: Final = 4
_ARGUMENTS_AT: Final = 16

# Machine: AUDIT_ARCH constant, number of seccomp(2) itself, column of the tables below.
_MACHINES: Final = {"x86_64": (0xC000003E, 317, 0), "aarch64": (0xC00000B7, 277, 1)}

_CLONE_THREAD: Final = 0x00010000
_WRITES: Final = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

# Names with their numbers on x86_64 and aarch64 (asm/unistd_64.h, asm-generic/unistd.h); None where a machine
# has no such call. None of these reaches a process, a file by name, or a network.
_PLAIN: Final[dict[str, tuple[int, int | None]]] = {
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "lseek": (8, 62),
    "close": (3, 57),
    "dup": (32, 23),
    "fstat": (5, 80),
    "stat": (4, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "sendto": (44, 206),
    "sendmsg": (46, 211),
    "shutdown": (48, 210),
    "socketpair": (53, 199),
    "poll": (7, None),
    "ppoll": (271, 73),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "eventfd2": (290, 19),
    "mmap": (9, 222),
    "mprotect": (10, 226),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "brk": (12, 214),
    "memfd_create": (319, 279),
    "ftruncate": (77, 46),
    "fallocate": (285, 47),
    "fadvise64": (221, 223),
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "membarrier": (324, 283),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115),
    "nanosleep": (35, 101),
    "gettimeofday": (96, 169),
    "restart_syscall": (219, 128),
    "getrandom": (318, 278),
    "sigaltstack": (131, 132),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "getrlimit": (97, 163),
    "setrlimit": (160, 164),
    "getpid": (39, 172),
    "gettid": (186, 178),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "exit": (60, 93),
    "exit_group": (231, 94),
}
# What files below one folder take besides. Only for a process in whose root nothing else can be written.
_WRITING: Final[dict[str, tuple[int, int]]] = {
    "openat": (257, 56),
    "openat2": (437, 437),
    "pwrite64": (18, 68),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "getdents64": (217, 61),
    "mkdirat": (258, 34),
    "unlinkat": (263, 35),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "linkat": (265, 37),
    "symlinkat": (266, 36),
    "readlinkat": (267, 78),
    "utimensat": (280, 88),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "flock": (73, 32),
}
_OPENAT: Final = (257, 56)
_CLONE: Final = (56, 220)
_CLONE3: Final = (435, 435)
_TGKILL: Final = (234, 131)
_PRLIMIT64: Final = (302, 261)

# Calls that are allowed for some values of one argument: numbers, index of the argument, values.
_CHOICES: Final[tuple[tuple[tuple[int, int], int, tuple[int, ...]], ...]] = (
    # F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_SETFL, F_DUPFD_CLOEXEC, F_ADD_SEALS, F_GET_SEALS: not F_SETOWN, which
    # sends signals to other processes.
    ((72, 25), 1, (0, 1, 2, 3, 4, 1030, 1033, 1034)),
    # FIONBIO, FIOCLEX
    ((16, 29), 1, (0x5421, 0x5451)),
    # PR_SET_NAME, PR_SET_VMA
    ((157, 167), 0, (15, 0x53564D41)),
)


def restrict(*, writes: bool = False) -> bool:
    """Allow all threads of this process, from now on, only what running or compiling a guest needs.

    Files can be opened for reading only, threads started but no processes, and signals sent to itself only;
    everything else fails with EPERM. It cannot be taken back. `PR_SET_NO_NEW_PRIVS` must be set already.

    Args:
        writes: files can also be made, written and removed, where mounts allow that.

    Returns:
        False where there is no such filter: another system or processor, or a kernel without seccomp.

    Raises:
        OSError: the kernel refuses the filter for a reason of ours.
    """
    machine = _MACHINES.get(platform.machine())
    if sys.platform != "linux" or machine is None or sys.maxsize < 1 << 32:
        return False
    arch, seccomp, column = machine
    program = b"".join(_program(arch, column, os.getpid(), writes=writes))
    code = ctypes.create_string_buffer(program, len(program))
    # struct sock_fprog: the count, padding, and the address.
    head = ctypes.create_string_buffer(struct.pack("@HP", len(program) // 8, ctypes.addressof(code)))
    result = ctypes.CDLL(None, use_errno=True).syscall(seccomp, _SET_MODE_FILTER, _TSYNC, head)
    if result == 0:
        return True
    number = ctypes.get_errno()
    if number in {errno.ENOSYS, errno.EINVAL}:
        return False
    raise OSError(number, f"seccomp failed ({result})")


def _program(arch: int, column: int, pid: int, *, writes: bool = False) -> list[bytes]:
    refuse = _instruction(_RETURN, _ERRNO | errno.EPERM)
    allow = _instruction(_RETURN, _ALLOW)
    lines = [
        _instruction(_LOAD, _ARCH_AT),
        _instruction(_IF_EQUAL, arch, 1, 0),
        _instruction(_RETURN, _KILL_PROCESS),
        # Calls of the x32 ABI have a bit set that no number here has, so they are refused at the end.
        _instruction(_LOAD, _NUMBER_AT),
    ]
    for numbers in (*_PLAIN.values(), *(_WRITING.values() if writes else ())):
        number = numbers[column]
        if number is not None:
            lines += [_instruction(_IF_EQUAL, number, 0, 1), allow]
    lines += _when(_CLONE3[column], [_instruction(_RETURN, _ERRNO | errno.ENOSYS)])  # libc then uses clone
    lines += _when(_OPENAT[column], [_argument(2), _instruction(_IF_ANY_BIT, _WRITES, 0, 1), refuse, allow])
    lines += _when(_CLONE[column], [_argument(0), _instruction(_IF_ANY_BIT, _CLONE_THREAD, 1, 0), refuse, allow])
    choices = [*_CHOICES, (_TGKILL, 0, (pid,)), (_PRLIMIT64, 0, (0, pid))]
    for numbers, argument, values in choices:
        checks = [part for value in values for part in (_instruction(_IF_EQUAL, value, 0, 1), allow)]
        lines += _when(numbers[column], [_argument(argument), *checks, refuse])
    return [*lines, refuse]


def _when(number: int, body: list[bytes]) -> list[bytes]:
    """Return code that runs `body`, which must return, when the call has this number."""
    return [_instruction(_IF_EQUAL, number, 0, len(body)), *body]


def _argument(index: int) -> bytes:
    """Load the low half of an argument; both machines are little-endian."""
    return _instruction(_LOAD, _ARGUMENTS_AT + 8 * index)


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)
