"""The process between an executor and its runner: `python -I -S keeper.py PID [CGROUP...]`, the runner's parent.

The first process of a namespace has to be somebody's child, and somebody has to clear up when the executor is
killed. It does nothing but wait. When the runner ends it removes its cgroup and ends too; on SIGTERM, which also
comes when the executor has gone, however that happened, it kills the runner first. It never sees anything of a
guest.

One stands beside each runner, so it imports nothing that costs megabytes. SIGTERM and SIGCHLD come blocked.
"""

import os
import sys
from signal import SIGCHLD, SIGKILL, SIGTERM, sigwait


def main(runner: int, folders: list[str]) -> int:
    """Wait for the runner, and clear up after it; return how it ended, as an exit code."""
    with open("/proc/self/comm", "w") as name:  # noqa: PTH123 - pathlib is such an import
        name.write("hive-keeper")
    while True:
        if sigwait({SIGTERM, SIGCHLD}) == SIGTERM:
            os.kill(runner, SIGKILL)
        ended, status = os.waitpid(runner, os.WNOHANG)
        if ended:
            break
    if killed := sum(map(_killed_for_memory, folders)):
        print(
            f"the kernel killed {killed} process over the memory limit of its cgroup", file=sys.stderr, flush=True
        )
    for folder in folders:
        try:  # noqa: SIM105 - contextlib is such an import
            os.rmdir(folder)  # noqa: PTH106
        except OSError:
            pass  # then the executor, or the next one, does it
    return os.waitstatus_to_exitcode(status) & 0xFF


def _killed_for_memory(folder: str) -> int:
    for name in ("memory.events", "memory.oom_control"):
        try:
            with open(f"{folder}/{name}") as file:  # noqa: PTH123
                words = file.read().split()
        except OSError:
            continue
        if "oom_kill" in words:
            return int(words[words.index("oom_kill") + 1])
    return 0


if __name__ == "__main__":
    os._exit(main(int(sys.argv[1]), sys.argv[2:]))
