"""An installation with several executors that have joined it, each in a home and in processes of its own.

All are on this machine. They have slots as they are told and not as there are cores, since what is measured with
them waits: a task that waits takes a slot and no CPU.
"""

import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import aiohttp
from hive_common.testing.installation import Installation, wait_until

from benchmarks.stack import MANIFEST

OWN: Final = "executor-1"
"""The installation's own executor; it is drained, as its slots are those of the machine's cores."""


class Fleet:
    """An installation and the executors `device-1`, `device-2`, … that have joined it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.installation = Installation(folder / "home")
        self._devices: dict[str, Installation] = {}
        self._drained: set[str] = set()

    def start(self, devices: int, slots: int, model_url: str = "") -> None:
        """Start everything, and wait until every executor is there."""
        hive = self.installation.hive
        hive("init", "--free-ports", "--executors", "1")
        hive("up", "--detach", *(("--model-url", model_url) if model_url else ()))
        hive("executor", "drain", OWN)
        for number in range(1, devices + 1):
            self.join(f"device-{number}", slots)

    def join(self, name: str, slots: int) -> None:
        """Let one more executor join, and wait for it."""
        token = self.installation.json("executor", "token")["token"]
        device = self._devices[name] = Installation(self.folder / name)
        # Nobody has a model there: the address is one that nothing listens on.
        options = ("--name", name, "--slots", str(slots), "--model-url", "http://127.0.0.1:9")
        device.hive("executor", "join", token, *options, "--free-ports", "--detach")
        wait_until(lambda: self._states().get(name) == "online", 60, f"{name} is online")

    def _states(self) -> dict[str, str]:
        listed = self.installation.get("/v1/executors", limit=100)["executors"]
        return {one["name"]: one["state"] for one in listed}

    def use(self, devices: int) -> None:
        """Let the first so many of the executors work, and drain the others."""
        for number, name in enumerate(self._devices):
            drained = number >= devices
            if drained != (name in self._drained):
                self.installation.hive("executor", "drain" if drained else "undrain", name)
                (self._drained.add if drained else self._drained.remove)(name)

    def push(self, name: str, source: str, permissions: dict[str, Any] | None = None) -> str:
        """Publish a Python agent, grant it what it asks for, and return its name with its version."""
        folder = self.folder / name
        folder.mkdir()
        manifest = MANIFEST.format(name=name, runtime="python", entry="agent.py")
        (folder / "manifest.yaml").write_text(
            manifest.replace("permissions: {}", f"permissions: {json.dumps(permissions or {})}")
        )
        (folder / "agent.py").write_text(source)
        self.installation.hive("agent", "push", str(folder))
        if permissions:
            self.installation.hive("agent", "grant", name, *permissions)
        return f"{name}@1.0.0"

    def push_command(self, name: str, module: bytes) -> str:
        """Publish a WASI command, and return its name with its version."""
        folder = self.folder / name
        folder.mkdir()
        (folder / "manifest.yaml").write_text(MANIFEST.format(name=name, runtime="command", entry="agent.wasm"))
        (folder / "agent.wasm").write_bytes(module)
        self.installation.hive("agent", "push", str(folder))
        return f"{name}@1.0.0"

    @asynccontextmanager
    async def client(self) -> AsyncIterator[aiohttp.ClientSession]:
        """Return a client of the gateway, which raises for what is refused."""
        endpoint = json.loads((self.installation.home / "hive.json").read_text())["endpoints"]["http"]
        key = (self.installation.home / "api-key").read_text().strip()
        async with aiohttp.ClientSession(
            endpoint,
            headers={"Authorization": f"Bearer {key}"},
            timeout=aiohttp.ClientTimeout(600),
            raise_for_status=True,
        ) as client:
            yield client

    def stop(self) -> None:
        """Stop everything."""
        for device in self._devices.values():
            device.hive("down", check=False)
        self.installation.hive("down", check=False)


@asynccontextmanager
async def fleet(devices: int, slots: int, model_url: str = "") -> AsyncIterator[Fleet]:
    """Start a fleet in a folder of its own; nothing of it is left at the end."""
    folder = Path(tempfile.mkdtemp(prefix="hive-fleet-"))
    made = Fleet(folder)
    try:
        made.start(devices, slots, model_url)
        yield made
    finally:
        made.stop()
        shutil.rmtree(folder, ignore_errors=True)


async def shown(client: aiohttp.ClientSession, job_id: str) -> dict[str, Any]:
    """Return a job as the gateway shows it.

    Raises:
        RuntimeError: it did not succeed.
    """
    async with client.get(f"/v1/jobs/{job_id}") as answer:
        found: dict[str, Any] = await answer.json()
    if found["state"] != "succeeded":
        raise RuntimeError(f"job {job_id} ended as {found}")
    return found
