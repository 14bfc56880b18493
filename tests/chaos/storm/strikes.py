"""Faults: what strikes, and how one sees that it has passed."""

import asyncio
import os
import random
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import psutil

PROCESSES = ("postgres", "nats", "registry", "scheduler", "router", "audit", "gateway")
BACK_S = 90.0
"""What is not back by then never will be: the storm ends with that as its finding."""
LOOK_S = 0.02


@dataclass
class Strike:
    """A fault that happened.

    Attributes:
        kind: such as `kill scheduler`.
        part: the process that was hit; the fault has passed when it has done its work again.
        executor: the id of that executor where it is one.
        at: when it struck (seconds since the epoch).
        ready_at: when every process said that it is ready again, what was killed with a new pid.
        alone: no other fault struck before it had passed.
    """

    kind: str
    part: str
    at: float
    ready_at: float | None = None
    alone: bool = True
    executor: str = ""


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


def kill(pid: int, number: int = signal.SIGKILL) -> None:
    """Send a signal; a process that is gone already is fine."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


async def kill_process(processes: Processes, name: str) -> Strike:
    """`kill -9` of one watched process."""
    pid = processes.pid(name)
    strike = Strike(f"kill {'executor' if name.startswith('executor') else name}", name, time.time())
    strike.executor = processes.executor_id(name)
    if pid is not None:
        kill(pid)
        strike.ready_at = await processes.all_ready({name: pid})
    return strike


async def kill_runner(processes: Processes, rng: random.Random) -> Strike:
    """`kill -9` of one runner, at work or not."""
    executor = rng.choice(processes.executors())
    runners = processes.runners(executor)
    strike = Strike("kill runner", executor, time.time())
    strike.executor = processes.executor_id(executor)
    if runners:
        kill(rng.choice(runners))
    strike.ready_at = strike.at
    return strike
