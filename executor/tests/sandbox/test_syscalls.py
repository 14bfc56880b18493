"""The filter of system calls, judged for both processors, one of which this machine is not.

The numbers are compared with the kernel's own headers (Debian: linux-libc-dev), and the filter is run by an
interpreter here, call by call, over every number that the headers have.
"""

import os
import re
import struct
from pathlib import Path

import pytest
from hive_executor.sandbox import confine, syscalls

HEADERS = {
    "x86_64": Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h"),
    "aarch64": Path("/usr/include/asm-generic/unistd.h"),  # which arm64 takes as it is
}
AUDIT = Path("/usr/include/linux/audit.h")
ELF = Path("/usr/include/linux/elf-em.h")
MACHINES = pytest.mark.parametrize("machine", list(HEADERS))
ALLOW, KILL = 0x7FFF0000, 0x80000000
EPERM, ENOSYS = 0x00050001, 0x00050000 | 38
PID = 1

# Names of calls that only 32-bit machines have, under numbers that others have on 64-bit ones.
ONLY_32_BIT = (
    *("fcntl64", "statfs64", "fstatfs64", "truncate64", "ftruncate64", "sendfile64", "fstatat64", "fstat64"),
    *("mmap2", "fadvise64_64", "stat64", "lstat64", "llseek"),
)

# Those that depend on an argument, with one that is let through and one that is not: index, yes, no.
CONDITIONAL = {
    "openat": (2, os.O_RDONLY | os.O_CLOEXEC, os.O_WRONLY),
    "clone": (0, 0x003D0F00, 17),  # what starts a thread, and SIGCHLD alone, which starts a process
    "tgkill": (0, PID, 2),
    "prlimit64": (0, 0, 2),
    "fcntl": (1, 1030, 8),  # F_DUPFD_CLOEXEC, F_SETOWN
    "ioctl": (1, 0x5451, 0x5412),  # FIOCLEX, TIOCSTI
    "prctl": (0, 15, 4),  # PR_SET_NAME, PR_SET_DUMPABLE
}


def numbers(machine: str) -> dict[str, int]:
    """The calls of a machine by name, as its kernel header has them."""
    header = HEADERS[machine]
    if not header.exists():
        pytest.skip(f"{header} is missing: apt-get install linux-libc-dev")
    found: dict[str, int] = {}
    aliases: dict[str, str] = {}
    for line in header.read_text().splitlines():
        if match := re.match(r"#define __NR(3264)?_(\w+)\s+(\d+)\s*$", line):
            found.setdefault(("3264_" if match[1] else "") + match[2], int(match[3]))
        elif match := re.match(r"#define __NR_(\w+)\s+__NR3264_(\w+)\s*$", line):
            aliases.setdefault(match[1], f"3264_{match[2]}")
    found |= {name: found[target] for name, target in aliases.items() if target in found}
    left_out = {"syscalls", "arch_specific_syscall", *ONLY_32_BIT}
    return {name: number for name, number in found.items() if not name.startswith("3264_") and name not in left_out}


def column(machine: str) -> int:
    return syscalls._MACHINES[machine][2]


@MACHINES
def test_numbers_are_those_of_the_kernel(machine: str) -> None:
    known = numbers(machine)
    at = column(machine)
    calls = syscalls._PLAIN | syscalls._WRITING
    mine = {name: pair[at] for name, pair in calls.items() if pair[at] is not None}
    assert {name: number for name, number in mine.items() if known.get(name) != number} == {}
    absent = {name for name, pair in syscalls._PLAIN.items() if pair[at] is None}
    assert not absent & set(known)
    named = {
        "openat": syscalls._OPENAT,
        "clone": syscalls._CLONE,
        "clone3": syscalls._CLONE3,
        "tgkill": syscalls._TGKILL,
        "prlimit64": syscalls._PRLIMIT64,
        "fcntl": syscalls._CHOICES[0][0],
        "ioctl": syscalls._CHOICES[1][0],
        "prctl": syscalls._CHOICES[2][0],
    }
    assert {name: pair[at] for name, pair in named.items()} == {name: known[name] for name in named}
    assert syscalls._MACHINES[machine][1] == known["seccomp"]
    assert confine._PIVOT_ROOT[machine] == known["pivot_root"]


@MACHINES
def test_the_architecture_is_the_one_that_the_kernel_reports(machine: str) -> None:
    if not (AUDIT.exists() and ELF.exists()):
        pytest.skip(f"{AUDIT} is missing: apt-get install linux-libc-dev")
    name = {"x86_64": "X86_64", "aarch64": "AARCH64"}[machine]
    flags = re.search(rf"#define AUDIT_ARCH_{name}\s+\(EM_{name}\|(.*)\)", AUDIT.read_text())
    number = re.search(rf"#define EM_{name}\s+(\d+)", ELF.read_text())
    assert flags is not None
    assert number is not None
    bits = {"__AUDIT_ARCH_64BIT": 0x80000000, "__AUDIT_ARCH_LE": 0x40000000}
    assert syscalls._MACHINES[machine][0] == int(number[1]) | sum(bits[word] for word in flags[1].split("|"))


def verdict(program: list[bytes], arch: int, number: int, arguments: dict[int, int]) -> int:
    """Run a classic BPF program over one call (linux/filter.h); only what the filter is made of."""
    words = [arguments.get(index, 0) for index in range(6)]
    data = struct.pack("=iIQ6Q", number, arch, 0, *words)
    at, value = 0, 0
    while True:
        code, if_true, if_false, constant = struct.unpack("=HBBI", program[at])
        at += 1
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, constant)
        elif code == 0x15:
            at += if_true if value == constant else if_false
        elif code == 0x45:
            at += if_true if value & constant else if_false
        else:
            assert code == 0x06, f"instruction {code:#x}"
            return constant


@MACHINES
def test_each_call_is_let_through_or_refused_as_its_name_says(machine: str) -> None:
    arch, _, at = syscalls._MACHINES[machine]
    program = syscalls._program(arch, at, PID)
    assert len(program) <= 4_096, "BPF_MAXINSNS"
    seen: dict[str, set[str]] = {"let through": set(), "refused": set()}
    for name, number in numbers(machine).items():
        if name in CONDITIONAL:
            index, yes, no = CONDITIONAL[name]
            assert verdict(program, arch, number, {index: yes}) == ALLOW, name
            assert verdict(program, arch, number, {index: no}) == EPERM, name
        elif name == "clone3":
            assert verdict(program, arch, number, {}) == ENOSYS
        else:
            found = verdict(program, arch, number, dict.fromkeys(range(6), 0))
            assert found in {ALLOW, EPERM}, name
            seen["let through" if found == ALLOW else "refused"].add(name)
    assert seen["let through"] == {name for name, pair in syscalls._PLAIN.items() if pair[at] is not None}
    assert {"execve", "socket", "connect", "ptrace", "mount", "kill", "unshare", "setns", "bpf", "io_uring_setup",
            "process_vm_writev", "pidfd_open", "openat2", "unlinkat", "symlinkat"} <= seen["refused"]  # fmt: skip


@MACHINES
def test_files_take_these_calls_besides_and_no_other(machine: str) -> None:
    arch, _, at = syscalls._MACHINES[machine]
    usual, writing = (syscalls._program(arch, at, PID, writes=writes) for writes in (False, True))
    assert len(writing) <= 4_096, "BPF_MAXINSNS"
    nothing, all_bits = dict.fromkeys(range(6), 0), dict.fromkeys(range(6), 0xFFFFFFFF)
    differ = {
        name
        for name, number in numbers(machine).items()
        for arguments in (nothing, all_bits)
        if verdict(usual, arch, number, arguments) != verdict(writing, arch, number, arguments)
    }
    assert differ == set(syscalls._WRITING)
    for name in syscalls._WRITING:
        assert verdict(writing, arch, numbers(machine)[name], all_bits) == ALLOW


@MACHINES
def test_calls_of_another_architecture_end_the_process(machine: str) -> None:
    arch, _, at = syscalls._MACHINES[machine]
    program = syscalls._program(arch, at, PID)
    for other in {0x40000003, 0x40000028, *(facts[0] for facts in syscalls._MACHINES.values())} - {arch}:
        assert verdict(program, other, 0, {}) == KILL
    assert verdict(program, arch, 0x40000000, {}) == EPERM, "the x32 ABI has no way around it"
