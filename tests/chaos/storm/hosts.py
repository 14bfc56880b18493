"""Faults of hosts: disks that are full or lose their power, clocks that are set, networks, a second scheduler."""

import asyncio
import os
import signal
import time
from collections.abc import Callable

from hive_common.testing.faults import JumpingClock, PowerDisk

from tests.chaos.storm.machine import Machine
from tests.chaos.storm.oracle import CLOCK_STEP_S
from tests.chaos.storm.processes import family, kill, signal_all
from tests.chaos.storm.standby import Ended, Standby
from tests.chaos.storm.target import HIT_S, PAST_LEASE_S, Strike, Striker, Target

LOOK_S = 0.1
CLOCK_SLACK_S = 600.0
"""Between the end of an attempt and its report, after a network that was away."""


class HostStrikes:
    """Args: `target` is what they strike."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self.kinds: dict[str, Striker] = {
            "two schedulers": self._two_schedulers,
            "scheduler with another clock": self._two_clocks,
        }
        if (disk := target.disk) is not None:
            self.kinds["full disk"] = lambda: self._fill_disk(disk)
        if (machine := target.machine) is not None:
            self.kinds["device: packets vanish"] = lambda: self._break_network(machine, "packets vanish")
            self.kinds["device: connections reset"] = lambda: self._break_network(machine, "connections reset")
            self.kinds["device: full disk"] = lambda: self._fill_device(machine)
            self.kinds["device: clock set"] = lambda: self._set_clock(machine)

    async def _passed(self, kind: str, **changed: int) -> Strike:
        struck = Strike(kind, time.time())
        struck.ready_at = await self._target.processes.all_ready(changed)
        return struck

    # --- a second scheduler ----------------------------------------------------------------------------------

    async def _two_schedulers(self) -> Strike | None:
        return await self._take_lead("two schedulers")

    async def _two_clocks(self) -> Strike | None:
        """The one that takes the lead goes by a clock that is off; it is set right while it leads."""
        ahead_s = self._target.rng.choice([-CLOCK_STEP_S, CLOCK_STEP_S])
        clock = JumpingClock(self._target.folder / "clock-of-standby")
        clock.jump(ahead_s)
        return await self._take_lead("scheduler with another clock", clock, -ahead_s)

    async def _take_lead(self, kind: str, clock: JumpingClock | None = None, jump_s: int = 0) -> Strike | None:
        """The scheduler dies, or sleeps until it is not the leader any more, and another one takes over; then back.

        It has struck when a task was decided under the other one, with a clock also after that was set.
        """
        target, wires = self._target, self._target.wires
        hit = False
        try:
            async with Standby(target.installation.home, target.folder, clock) as standby, asyncio.timeout(HIT_S):
                await standby.stands_by()
                first = target.processes.pid("scheduler")
                frozen = [] if first is None or target.rng.random() < 0.5 else family(first)
                signal_all(frozen, signal.SIGSTOP) if frozen else kill(first)
                try:
                    await standby.leads()
                    wires.scheduler.lead_to(standby.grpc_port)
                finally:
                    # It still believes that it leads.
                    signal_all(frozen, signal.SIGCONT)
                await target.progress.decided()
                if clock is not None:
                    clock.jump(jump_s)
                    await asyncio.sleep(2)  # it looks once a second
                    await target.progress.decided()
                hit = standby.still_leads()
        except (Ended, TimeoutError):
            pass
        finally:
            wires.scheduler.lead_to(wires.scheduler_port)
        struck = await self._passed(kind)
        return struck if hit else None

    # --- full disks ------------------------------------------------------------------------------------------

    async def _fill_disk(self, disk: PowerDisk) -> Strike | None:
        """The disk of the whole home. It has struck when submits stay without an answer while nothing is free."""
        clients = self._target.clients
        before = clients.lost_answers

        def holds() -> bool:
            disk.fill()
            return os.statvfs(disk.folder).f_bavail == 0 and clients.lost_answers > before

        try:
            hit = await _until(holds)
            await asyncio.sleep(self._target.rng.uniform(0.5, 4))
        finally:
            await asyncio.to_thread(disk.free)
        struck = await self._passed("full disk")
        return struck if hit else None

    async def _fill_device(self, machine: Machine) -> Strike | None:
        """The disk that takes a device's outcomes, whose network comes and goes. It has struck when it says so."""
        until = time.monotonic() + HIT_S
        hit = False
        before = machine.failed_writes()

        def holds() -> bool:
            machine.disk.fill()
            return machine.failed_writes() > before

        try:
            while not hit and time.monotonic() < until:
                # What is answered at once never goes to disk; without a network for long there is nothing new.
                machine.wire.drop()
                hit = await _until(holds, 2)
                machine.wire.heal()
                hit = hit or await _until(holds, 3)
            await asyncio.sleep(self._target.rng.uniform(0.5, 4))
        finally:
            machine.wire.heal()
            await asyncio.to_thread(machine.disk.free)
        return await self._device_passed(machine, "device: full disk", hit)

    # --- networks and clocks of a device ---------------------------------------------------------------------

    async def _break_network(self, machine: Machine, how: str) -> Strike | None:
        """Below the lease or beyond it. It has struck when packets were stopped."""
        seconds = self._target.rng.choice([1.5, PAST_LEASE_S])
        (machine.wire.drop if how == "packets vanish" else machine.wire.reset)()
        try:
            await asyncio.sleep(seconds)
            hit = machine.wire.hits() > 0
        finally:
            machine.wire.heal()
        return await self._device_passed(machine, f"device: {how}", hit)

    async def _set_clock(self, machine: Machine) -> Strike | None:
        """It has struck when the device reports the end of an attempt by the new time."""
        assert machine.clock is not None
        clocks, device = self._target.echo.clocks, machine.device.id
        ahead_s = machine.clock.ahead_s + self._target.rng.choice([-CLOCK_STEP_S, CLOCK_STEP_S])
        machine.clock.jump(ahead_s - machine.clock.ahead_s)
        hit = await _until(lambda: abs(clocks.get(device, 0) - ahead_s) < CLOCK_SLACK_S)
        return await self._device_passed(machine, "device: clock set", hit)

    async def _device_passed(self, machine: Machine, kind: str, hit: bool) -> Strike | None:
        struck = Strike(kind, time.time(), executor=machine.device.id)
        await machine.online()
        struck.ready_at = await self._target.processes.all_ready({})
        return struck if hit else None


async def _until(holds: Callable[[], bool], seconds: float = HIT_S) -> bool:
    """Say whether it came to hold in time."""
    until = time.monotonic() + seconds
    while not await asyncio.to_thread(holds):
        if time.monotonic() > until:
            return False
        await asyncio.sleep(LOOK_S)
    return True
