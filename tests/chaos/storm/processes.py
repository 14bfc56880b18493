"""The processes of an installation, as its supervisor's state file has them."""

import asyncio
import os
import signal
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil

BACK_S = 90.0
"""What is not back by then never will be: the storm ends with that as its finding."""
LOOK_S = 0.02


class Processes:
    """The processes of an installation as its supervisor's state file has them."""

    def __init__(self, home: Path) -> None:
        self._home = home
        self._file = home / "run" / "state.json"

    def state(self) -> dict[str, Any]:
        """Return the whole state; empty where there is none."""
        try:
            found: dict[str, Any] = msgspec.json.decode(self._file.read_bytes())
        except (OSError, msgspec.DecodeError):
            return {"state": "", "services": []}
        return found

    def pid(self, name: str) -> int | None:
        """Return the pid of a process that runs."""
        found: int | None = next((one["pid"] for one in self.state()["services"] if one["name"] == name), None)
        return found

    def executors(self) -> list[str]:
        """Return the names of the executors."""
        return [one["name"] for one in self.state()["services"] if one["name"].startswith("executor")]

    def executor_id(self, name: str) -> str:
        """Return the id of an executor, empty where `name` is none."""
        entries = msgspec.json.decode((self._home / "hive.json").read_bytes())["executors"]
        return next((str(entry["id"]) for entry in entries if entry["name"] == name), "")

    def runners(self, executor: str) -> list[int]:
        """Return the pids of the runners below an executor."""
        pid = self.pid(executor)
        try:
            children = psutil.Process(pid).children(recursive=True) if pid else []
            return [child.pid for child in children if "hive_executor.sandbox.runner" in child.cmdline()]
        except psutil.Error:
            return []

    async def all_ready(self, changed: dict[str, int]) -> float:
        """Return when everything was ready, each of `changed` with another pid than the one given.

        Raises:
            TimeoutError: not within `BACK_S`.
        """
        async with asyncio.timeout(BACK_S):
            while True:
                state = self.state()
                pids = {one["name"]: one["pid"] for one in state["services"]}
                renewed = all(pids.get(name) not in (None, pid) for name, pid in changed.items())
                if state["state"] == "ready" and renewed:
                    return time.time()
                await asyncio.sleep(LOOK_S)


def kill(pid: int | None, number: int = signal.SIGKILL) -> bool:
    """Send a signal; say whether there was a process that lived."""
    try:
        if pid is None or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return False
        os.kill(pid, number)
    except (ProcessLookupError, psutil.NoSuchProcess):
        return False
    return True


def family(pid: int) -> list[psutil.Process]:
    """Return a process and everything below it; empty where it is gone."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def signal_all(processes: list[psutil.Process], number: int) -> bool:
    """Send a signal to each that is still there; say whether the first was."""
    sent = [kill(process.pid, number) for process in processes]
    return bool(sent) and sent[0]
