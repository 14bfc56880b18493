"""Executors by the dozen: they connect, verify and obey as real ones do, and their guests are coroutines."""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, Self

import msgspec
from hive_common.bus import nats as bus
from hive_common.contracts.messages import Assignment, AttemptKey, KillOrder
from hive_common.control.orders import Stopped
from hive_common.control.verifier import LOWER_EPOCH, REFUSED
from hive_common.eventlog.log import LogReader
from hive_common.kernel.errors import HiveError
from hive_common.rpc.client import call
from hive_common.testing.fixtures import Database, NatsServer
from hive_common.testing.identities import EVERYTHING
from hive_common.testing.kills import KillKey
from hive_executor.kill import KillSwitch
from hive_proto.control.v1 import control_pb2, control_pb2_grpc

from tests.integration.plane import Executor, Plane

NEVER_S: Final = 60.0
"""Well before the limit of a test, which leaves no time to put away what runs."""
AT_MOST_S: Final = 2.0
"""From an order to its last effect (law 9)."""


class Member:
    """One executor with one guest at a time, which never ends by itself."""

    def __init__(self, executor: Executor, key: str, folder: Path, changed: Callable[[], None]) -> None:
        self.id = executor.id
        self.job = ""
        self._executor = executor
        self._changed = changed
        folder.mkdir()
        self._kill = KillSwitch(executor.id, key, folder, self._obey)
        self.guests: dict[AttemptKey, tuple[Assignment, asyncio.Task[None]]] = {}
        self._pulling: asyncio.Task[None] | None = None

    async def open(self, listening: bool) -> None:
        """Listen to orders, if it should, and pull."""
        if listening:
            await self._kill.open(SimpleNamespace(client=self._executor.client))  # type: ignore[arg-type]
            await self._executor.client.flush()
        self._pulling = asyncio.create_task(self._pull())

    async def close(self) -> None:
        """Pull no more."""
        tasks = [task for _, task in self.guests.values()]
        if self._pulling is not None:
            tasks.append(self._pulling)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _pull(self) -> None:
        while True:
            try:
                reply = await self._executor.pull(
                    1 - len(self.guests), tuple(self.guests), kill_epoch=self._kill.epoch
                )
            except HiveError:
                await asyncio.sleep(0.02)
                continue
            if reply.unknown or reply.error is not None:
                await asyncio.sleep(0.02)
                continue
            self._kill.told(reply.kill)
            for key in reply.cancel:
                self._end(key)
            for one in reply.assignments:
                if not self._stops(one):
                    self._begin(one)

    def _begin(self, one: Assignment) -> None:
        key = AttemptKey(one.task, one.attempt)
        if key not in self.guests:
            self.job = one.job
            self.guests[key] = one, asyncio.create_task(asyncio.sleep(3600))
            self._changed()

    def _end(self, key: AttemptKey) -> None:
        found = self.guests.pop(key, None)
        if found is not None:
            found[1].cancel()
            self._changed()

    def _stops(self, one: Assignment) -> bool:
        return self._kill.stopped.attempt(self.id, one.agent.name, one.agent.version, one.job) is not None

    def _obey(self, _: Stopped) -> None:
        for key, (one, _task) in list(self.guests.items()):
            if self._stops(one):
                self._end(key)


class Crowd:
    """A control plane with a kill key, and executors that all have something to do."""

    def __init__(self, database: Database, nats: NatsServer, folder: Path) -> None:
        self.key = KillKey()
        self.plane = Plane(database, nats, folder, kill_public_key=self.key.public)
        self.members: list[Member] = []
        self.jobs: list[str] = []
        self._folder = folder
        self._nats = nats
        self._changed = asyncio.Event()
        self._reader = LogReader(database.dsn)
        self._position = 0
        self._logged: Counter[str] = Counter()

    @asynccontextmanager
    async def working(self, count: int, listening: bool = True) -> AsyncIterator[Self]:
        """Run it with so many executors, each at work on a job of its own."""
        async with self.plane.running(*(f"e{number}" for number in range(count))):
            for number, executor in enumerate(self.plane.executors.values()):
                member = Member(executor, self.key.public, self._folder / f"state-{number}", self._changed.set)
                self.members.append(member)
                await member.open(listening)
            try:
                self.jobs = [await self.plane.submit(timeout="1h") for _ in range(count)]
                await self.all_running()
                yield self
            finally:
                await asyncio.gather(*(member.close() for member in self.members))
                await self._reader.close()

    def now(self) -> float:
        """Return seconds on a clock that only runs forward."""
        return asyncio.get_running_loop().time()

    def running(self) -> list[AttemptKey]:
        """Return what runs now."""
        return [key for member in self.members for key in member.guests]

    async def give(self, signed: KillOrder) -> None:
        """Give an order as the gateway passes it on."""
        stub = control_pb2_grpc.ControlStub(self.plane.registry)
        request = control_pb2.OrderRequest(order=signed.order, signature=signed.signature, caller="me")
        await call(stub.Order(request, metadata=self.plane.registry_key))

    async def until_logged(self, name: str, count: int) -> None:
        """Return when the log has so many events of a type."""
        while (await self.logged())[name] < count:
            await asyncio.sleep(0.005)

    async def all_running(self) -> None:
        """Return when every executor has something to do."""
        await self.until(lambda: len(self.running()) == len(self.members))

    async def until(self, condition: Callable[[], bool]) -> None:
        """Return when something holds that changes with guests, or within milliseconds.

        Raises:
            TimeoutError: it never does.
        """
        async with asyncio.timeout(NEVER_S):
            while not condition():
                self._changed.clear()
                try:
                    async with asyncio.timeout(0.05):
                        await self._changed.wait()
                except TimeoutError:
                    pass

    async def logged(self) -> Counter[str]:
        """Return how many events of each type there are."""
        while True:
            found = await self._reader.read(self._position, 10_000, payloads=False)
            self._logged.update(stored.type for stored in found)
            if not found:
                return self._logged
            self._position = found[-1].position

    def refused(self) -> float:
        """Return how many orders of an epoch that was over were refused, by everybody in this process."""
        counted: float = REFUSED.labels(LOWER_EPOCH)._value.get()
        return counted

    async def publish(self, subject: str, body: Any) -> None:
        """Say something on NATS as somebody who may say everything."""
        client = await bus.connect(self._nats.issuer.service(EVERYTHING, self._folder), EVERYTHING)
        await client.publish(subject, msgspec.json.encode(body))
        await client.flush()
        await client.close()
