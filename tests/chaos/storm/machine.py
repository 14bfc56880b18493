"""A device that is a machine of its own: another network, another disk, another clock."""

import asyncio
import contextlib
from pathlib import Path

from hive_common.testing.device import Device
from hive_common.testing.faults import JumpingClock, SmallDisk, Wire, lacking
from hive_common.testing.installation import Installation

from tests.chaos.storm.processes import BACK_S

NEEDS = ("ip", "nft", "nsenter", "mount")
DISK_MIB = 4
LOOK_S = 0.2
NO_SPACE = "cannot be written: No space left on device"


class Machine:
    """A device on the far end of a wire. When it ends it is started again, as a service of a system would be.

    Args:
        installation: that knows it by name and does not run it.
        wire: between the two.
        folder: for what is its own.
        name: of the executor.

    Attributes:
        clock: None where no library can set it.
    """

    def __init__(self, installation: Installation, wire: Wire, folder: Path, name: str) -> None:
        self._folder = folder
        self.wire = wire
        self.disk = SmallDisk(folder / "state", DISK_MIB)
        self.clock = None if lacking("libfaketime") else JumpingClock(folder / "clock")
        self.device = Device(
            installation,
            name,
            address=wire.address,
            prefix=wire.in_device([]),
            environment=self.clock.environment if self.clock else {},
            folder=folder,
        )
        self._keeping: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Machine":
        self._keeping = asyncio.create_task(self._keep())
        await self.online()
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        self.wire.heal()
        self.disk.free()
        await asyncio.to_thread(self.device.stop)
        await asyncio.to_thread(self.disk.remove)

    async def online(self) -> None:
        """Return when the control plane sees it.

        Raises:
            TimeoutError: not within `BACK_S`.
        """
        async with asyncio.timeout(BACK_S):
            while (await asyncio.to_thread(self.device.state))["state"] != "online":
                await asyncio.sleep(LOOK_S)

    def failed_writes(self) -> int:
        """Return how often it said that its disk is full."""
        return self.device.log_file.read_text(errors="replace").count(NO_SPACE)

    def log(self, lines: int = 8) -> str:
        """Return the last lines that it said."""
        with contextlib.suppress(FileNotFoundError):
            return "\n".join(self.device.log_file.read_text(errors="replace").splitlines()[-lines:])
        return ""

    async def _keep(self) -> None:
        while True:
            if self.device.ended():
                # On this thread, which outlives it: its end is that of the process.
                self.device.launch()
            await asyncio.sleep(LOOK_S)
