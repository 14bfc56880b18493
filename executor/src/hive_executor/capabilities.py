"""What this device is and can do."""

import asyncio
import logging
import os
import platform
import shutil
import sys
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import msgspec
import psutil
from hive_common.contracts.events import Capabilities, Gpu, Model, Power, Tier

from hive_executor import machine
from hive_executor.agents import RUNTIMES
from hive_executor.sandbox.engine import engine_version

log = logging.getLogger(__name__)

PROBE_S_MAX: Final = 5.0
BATTERY_BAND_PERCENT: Final = 5
"""A battery that moves less than this is no news."""

_ARCHITECTURES: Final = {"x86_64": "amd64", "amd64": "amd64", "aarch64": "arm64", "arm64": "arm64"}
_VENDORS: Final = {"0x1002": "AMD", "0x10de": "NVIDIA", "0x8086": "Intel", "0x106b": "Apple"}


class Device:
    """The parts of the capabilities that do not change while this process runs."""

    def __init__(
        self, *, slots: int, memory_bytes: int, labels: dict[str, str], device: str = "", tier: Tier = "worker"
    ) -> None:
        """Args: `device` names the machine where its own id is not to."""
        self._device = device or machine.device()
        self._tier = tier
        self.slots = slots or cores()
        self.memory_bytes = memory_bytes or psutil.virtual_memory().total // 2
        self._labels = labels
        self.sandbox = ""
        """What runners have around the engine; told as the label `sandbox`, unless the owner set one."""
        self.has_scratch = False
        self._gpus: tuple[Gpu, ...] | None = None

    async def capabilities(self, models: Iterable[Model]) -> Capabilities:
        """Return the capabilities as they are now."""
        if self._gpus is None:
            self._gpus = await gpus()
        return Capabilities(
            os=platform.system().lower(),
            arch=architecture(),
            cores=cores(),
            memory_bytes=self.memory_bytes,
            slots=self.slots,
            runtimes=RUNTIMES,
            engine=f"wasmtime {engine_version()}",
            version=version("hivefabric-executor"),
            gpus=self._gpus,
            power=power(),
            models=tuple(models),
            labels={"sandbox": self.sandbox, **self._labels} if self.sandbox else self._labels,
            scratch=self.has_scratch,
            device=self._device,
            tier=self._tier,
        )


def cores() -> int:
    """Return the number of cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity is not None else os.cpu_count() or 1


def architecture() -> str:
    """Return the processor architecture by its OCI name (`amd64`, `arm64`, …)."""
    machine = platform.machine().lower()
    return _ARCHITECTURES.get(machine, machine)


def power() -> Power:
    """Return the state of battery and charger; a device without a battery counts as charging."""
    try:
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
    except (OSError, NotImplementedError) as error:
        log.info("the battery cannot be read: %s", error)
        battery = None
    if battery is None:
        return Power()
    # Where the charger cannot be told, a battery is taken to be draining: that spares it.
    return Power(battery_percent=round(battery.percent), charging=bool(battery.power_plugged))


def is_news(old: Capabilities | None, new: Capabilities) -> bool:
    """Say whether a change is worth telling: any but a few percent of battery."""
    if old is None:
        return True
    before, now = old.power.battery_percent, new.power.battery_percent
    if before is not None and now is not None and abs(before - now) < BATTERY_BAND_PERCENT:
        old = msgspec.structs.replace(old, power=msgspec.structs.replace(old.power, battery_percent=now))
    return old != new


async def gpus() -> tuple[Gpu, ...]:
    """Return the graphics processors that can be found; none where nothing tells."""
    if shutil.which("nvidia-smi"):
        found = _from_nvidia_smi(
            await _output("nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader,nounits")
        )
        if found:
            return found
    if sys.platform == "darwin":
        return _from_system_profiler(await _output("system_profiler", "SPDisplaysDataType", "-json"))
    return await asyncio.to_thread(_from_drm, Path("/sys/class/drm"))


def _from_nvidia_smi(text: str) -> tuple[Gpu, ...]:
    found = []
    for line in text.splitlines():
        name, _, mebibytes = line.rpartition(",")
        if name and mebibytes.strip().isdecimal():
            found.append(Gpu(name.strip(), int(mebibytes) << 20))
    return tuple(found)


def _from_system_profiler(text: str) -> tuple[Gpu, ...]:
    try:
        cards: list[dict[str, Any]] = msgspec.json.decode(text)["SPDisplaysDataType"]
        return tuple(Gpu(str(card["sppci_model"])) for card in cards)
    except (msgspec.DecodeError, KeyError, TypeError):
        return ()


def _from_drm(folder: Path) -> tuple[Gpu, ...]:
    found = []
    for card in sorted(folder.glob("card[0-9]*")):
        device = card / "device"
        vendor = _VENDORS.get(_line(device / "vendor"))
        # Connectors such as card0-HDMI-A-1 stand beside the cards; virtual displays have other vendors.
        if "-" in card.name or vendor is None:
            continue
        memory = _line(device / "mem_info_vram_total")
        found.append(Gpu(f"{vendor} {_line(device / 'device')}", int(memory) if memory.isdecimal() else 0))
    return tuple(found)


def _line(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""


async def _output(*command: str) -> str:
    try:
        child = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
        )
    except OSError as error:
        log.info("%s: %s", command[0], error)
        return ""
    try:
        async with asyncio.timeout(PROBE_S_MAX):
            stdout, _ = await child.communicate()
    except TimeoutError:
        child.kill()
        await child.wait()
        log.info("%s: no answer within %g s", command[0], PROBE_S_MAX)
        return ""
    return stdout.decode("utf-8", "replace") if child.returncode == 0 else ""
