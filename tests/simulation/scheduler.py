"""A scheduler's machine: the real `Leader` on a made-up database and network, started again whenever it ends."""

import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import psycopg
from hive_common.contracts.limits import LEASE_MS
from hive_common.kernel.errors import Unavailable
from hive_common.ops.lifecycle import Stop
from hive_scheduler.leader import Leader
from hive_scheduler.leadership import contend

from .database import Database, Session, Wire
from .jobs import OWNER
from .loop import Process
from .network import Client

if TYPE_CHECKING:
    from .world import World

BOOT_US = 1_800_000_000_000_000


class Clock:
    """The clocks of one machine (hive_common.kernel.clock.Clock)."""

    def __init__(self, time_s: Callable[[], float], offset_us: int) -> None:
        self._time_s = time_s
        self.offset_us = offset_us

    def now_us(self) -> int:
        """Microseconds since the epoch."""
        return BOOT_US + int(self._time_s() * 1e6) + self.offset_us

    def boot_ms(self) -> int:
        """Milliseconds that only rise."""
        return 1_000_000 + int(self._time_s() * 1e3)


class SchedulerNode:
    """One machine.

    Attributes:
        leader: the one that takes requests now, if it leads.
    """

    def __init__(self, world: "World", name: str, rng: random.Random) -> None:
        self._world = world
        self._rng = rng
        self.name = name
        self.wire = Wire()
        self.clock = Clock(world.loop.time, rng.randrange(-50_000, 50_000))
        self.leader: Leader | None = None
        self.process: Process
        self.client: Client
        self._session: Session
        self._generation = 0

    def start(self) -> None:
        """Start the process."""
        world = self._world
        self._generation += 1
        self.process = Process(world.loop, f"{self.name}.{self._generation}")
        self.client = world.bus.client(self.process)
        self.client.on_disconnect = self._freeze
        self.client.on_reconnect = self._thaw
        self._session = Session(world.server, self.process, self.wire)
        self.process.spawn(self._main(self.process, self.client, self._session))

    def crash(self, power: bool = False) -> None:
        """Kill -9, and start again after a while; with `power` nobody tells the database of it."""
        if not self.process.alive:
            return
        self._world.trace(self.name, "loses its power" if power else "is killed")
        self.process.kill()
        if not power:
            self._session.die()
        self._world.bus.drop(self.client)
        self._ended()

    def _ended(self) -> None:
        self.leader = None
        pause_s = self._rng.uniform(0.1, 3.0)
        self._world.loop.call_later(pause_s, self.start, context=self._world.loop.world)

    async def _main(self, process: Process, client: Client, session: Session) -> None:
        """Do what `hive_scheduler.bootstrap` does."""
        world, stop = self._world, Stop()
        try:
            epoch = await contend(session, self.clock, lambda _: None)  # type: ignore[arg-type]
            database = Database(session, world.server, self.wire)
            leader = Leader(
                database,
                epoch,
                client,  # type: ignore[arg-type]
                world.store,  # type: ignore[arg-type]
                "default",
                OWNER,
                self.clock,
                stop,
                LEASE_MS,
                chance=self._rng.random,
            )
            try:
                await leader.start()
                self.leader = leader
                world.trace(self.name, f"leads, epoch {epoch}, {len(leader.engine.jobs)} open jobs")
                await stop.wait()
                world.trace(self.name, f"ends: {stop.reason}")
            finally:
                self.leader = None
                await leader.close()
        except (psycopg.OperationalError, Unavailable) as error:
            world.trace(self.name, f"ends: {error}")
        finally:
            await session.close()
            await client.close()
            process.kill()
            self._ended()

    def _freeze(self) -> None:
        if self.leader is not None:
            self.leader.dispatcher.freeze()

    def _thaw(self) -> None:
        if self.leader is not None:
            self.leader.dispatcher.thaw()

    async def serve(self, call: Callable[[Leader], Awaitable[Any]]) -> Any:
        """Take a request of a client."""
        if self.leader is None:
            raise Unavailable("stands by")
        return await call(self.leader)
