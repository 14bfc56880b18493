"""What a storm strikes, and what a strike is."""

import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

from hive_common.testing.faults import PowerDisk
from hive_common.testing.installation import Installation

from tests.chaos.storm.clients import Clients
from tests.chaos.storm.machine import NEEDS, Machine
from tests.chaos.storm.processes import Processes
from tests.chaos.storm.progress import Progress
from tests.chaos.storm.wires import Echo, Wires

HIT_S = 45.0
"""What has not struck by then does not count."""
PAST_LEASE_S = 7.5
"""A lease is 6 s."""
DISK = ("mkfs.ext4", "mount")

PROGRAMS: dict[str, tuple[str, ...]] = {
    "slow fsync": ("strace",),
    "power cut": DISK,
    "full disk": DISK,
    "scheduler with another clock": ("libfaketime",),
    "device: packets vanish": NEEDS,
    "device: connections reset": NEEDS,
    "device: full disk": NEEDS,
    "device: clock set": (*NEEDS, "libfaketime"),
}
"""What a kind takes that not every machine has, as `hive_common.testing.faults.lacking` knows it."""

TOUCHES: dict[str, str] = {
    "kill supervisor": "home",
    "power cut": "home",
    "full disk": "home",
    "two schedulers": "home",
    "scheduler with another clock": "home",
    "cut commit": "database",
    "cut answer to commit": "database",
    "cut database": "database",
    "device: packets vanish": "wire",
    "device: connections reset": "wire",
    "device: full disk": "wire",
}
"""What of two kinds only one can have its hands on at a time."""


@dataclass
class Strike:
    """A fault that happened.

    Attributes:
        kind: such as `kill scheduler`.
        at: when it struck; of one that lasts, when it ended (seconds since the epoch).
        ready_at: when every process said that it is ready again, what was killed with a new pid.
        alone: no other fault struck before it had passed.
        executor: the id of the executor that was hit.
    """

    kind: str
    at: float
    ready_at: float | None = None
    alone: bool = True
    executor: str = ""


Striker = Callable[[], Awaitable[Strike | None]]
"""Strikes, and returns when everything is ready again; None where it turned out that nothing was hit."""


@dataclass
class Target:
    """An installation at work.

    Attributes:
        executors: how many its supervisor runs.
        folder: for files that are not in its home.
        rng: seeded.
        disk: under its home, None where there is none whose power can be cut.
        machine: a device of its own, None where this machine cannot make one.
    """

    installation: Installation
    processes: Processes
    wires: Wires
    echo: Echo
    clients: Clients
    progress: Progress
    executors: int
    folder: Path
    rng: random.Random
    disk: PowerDisk | None = None
    machine: Machine | None = None
