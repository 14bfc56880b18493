"""A second scheduler on the same database, which takes the lead when the first one loses it."""

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import aiohttp
from hive_common.ops.ports import free_port
from hive_common.testing.faults import JumpingClock

from tests.chaos.storm.processes import kill

LOOK_S = 0.05
ANSWER_S = 2.0


class Ended(Exception):
    """It has ended before it came to what was waited for."""


class Standby:
    """A scheduler that no supervisor watches, configured as the first one is, but for its ports.

    Args:
        home: of the installation.
        folder: for what is its own.
        clock: that it goes by, None for the true one.

    Attributes:
        grpc_port: where it answers while it leads.
    """

    def __init__(self, home: Path, folder: Path, clock: JumpingClock | None = None) -> None:
        config = json.loads((home / "config" / "scheduler.json").read_text())
        self.grpc_port = config["grpc_port"] = free_port()
        self._ops_port = config["ops_port"] = free_port()
        self._config_file = folder / "standby.json"
        self._config_file.write_text(json.dumps(config))
        self._log_file = folder / "standby.log"
        self._environment = {**os.environ, **(clock.environment if clock else {})}
        self._process: subprocess.Popen[bytes] | None = None

    async def __aenter__(self) -> "Standby":
        command = [sys.executable, "-P", "-m", "hive_scheduler", "--config", str(self._config_file), "--supervised"]
        with self._log_file.open("ab") as log:
            self._process = subprocess.Popen(
                command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._process is not None
        kill(self._process.pid)
        await asyncio.to_thread(self._process.wait)

    async def stands_by(self) -> None:
        """Return when it waits for the lead, or has it. Raises `Ended`."""
        await self._says(503, "stands by")

    async def leads(self) -> None:
        """Return when it leads. Raises `Ended`."""
        await self._says(200, "")

    def still_leads(self) -> bool:
        """Say whether it runs and has never left the lead, which ends a scheduler."""
        return self._process is not None and self._process.poll() is None

    async def _says(self, status: int, text: str) -> None:
        """Wait for an answer of its readiness, or for the one of a leader."""
        assert self._process is not None
        timeout = aiohttp.ClientTimeout(total=ANSWER_S)
        async with aiohttp.ClientSession(f"http://127.0.0.1:{self._ops_port}", timeout=timeout) as session:
            while self._process.poll() is None:
                try:
                    async with session.get("/readyz") as answer:
                        if answer.status == 200 or (answer.status == status and text in await answer.text()):
                            return
                except (aiohttp.ClientError, TimeoutError):
                    pass
                await asyncio.sleep(LOOK_S)
        raise Ended
