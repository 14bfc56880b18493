"""What stands between the processes: proxies that cut and hold back, and an echo that repeats and forges."""

import asyncio
import itertools
import json
import random
import re
import signal
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

from hive_common.bus.nats import connect
from hive_common.testing.identities import EVERYTHING, everything_in
from hive_common.testing.proxy import TcpProxy
from nats.aio.client import Client
from nats.aio.msg import Msg

from tests.chaos.storm.processes import Processes, kill

SLOTS = 2
ECHO_SHARE = 0.04
FORGED_SHARE = 0.1
ECHO_S = 3.0
FORGED = {"inline": {"square": -1, "forged": True}, "size_bytes": 28}
ANSWER = re.compile(rb'("answer": ?"=)(\d{10})"')
LIARS = 2
"""Executors that lie; one of them about each number, so that of any three two are honest."""


class Liar:
    """Makes a lie of what an executor says that a witness answers, about numbers that the seed gives to it.

    No two liars say the same, and the lie is as long as the truth: who reads sizes sees nothing.

    Args:
        seed: of the storm.
        number: of this liar.

    Attributes:
        told: lies so far.
    """

    def __init__(self, seed: int, number: int) -> None:
        self._seed = seed
        self._number = number
        self.told = 0

    def __call__(self, said: bytes) -> bytes:
        return ANSWER.sub(self._answer, said)

    def _answer(self, match: re.Match[bytes]) -> bytes:
        truth = int(match[2])
        drawn = random.Random(f"{self._seed} {truth}").randrange(LIARS)
        if drawn != self._number:
            return match[0]
        self.told += 1
        lie = (truth + 10**9 * (1 + self._number)) % 10**10
        return match[1] + b'%010d"' % lie


class Wires:
    """Proxies: from the executors to NATS, from the scheduler to PostgreSQL, from the gateway to the scheduler.

    Some executors reach NATS through one more, which lies.
    """

    def __init__(self, home: Path, processes: Processes, seed: int) -> None:
        self._home = home
        self._processes = processes
        ports = json.loads((home / "hive.json").read_text())["ports"]
        self.nats = TcpProxy(ports["nats"])
        self.database = TcpProxy(ports["postgres"])
        self.scheduler_port = int(self._config("scheduler")["grpc_port"])
        self.scheduler = TcpProxy(self.scheduler_port)
        self.liars = [Liar(seed, number) for number in range(LIARS)]
        self._to_nats: dict[str, TcpProxy] = {}
        self._open = AsyncExitStack()

    @property
    def lies(self) -> int:
        """How many lies were told so far."""
        return sum(liar.told for liar in self.liars)

    async def __aenter__(self) -> "Wires":
        for proxy in (self.nats, self.database, self.scheduler):
            await self._open.enter_async_context(proxy)
        # The first one is what a device of its own is configured after: it would say the same lies.
        for name, liar in zip(sorted(self._processes.executors())[1:], self.liars, strict=True):
            proxy = self._to_nats[name] = await self._open.enter_async_context(TcpProxy(self.nats.port))
            proxy.change = liar
        await self.lay()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._open.aclose()

    async def lay(self) -> None:
        """Lead the processes through the proxies: their configuration names other ports, and they start anew.

        `hive up` writes the configuration as it was, so that this has to follow each of them.
        """
        changed = {}
        for name in ["scheduler", "gateway", *self._processes.executors()]:
            config = self._config(name)
            if name == "scheduler":
                config["postgres"]["port"] = self.database.port
            elif name == "gateway":
                config["peers"]["scheduler"] = f"127.0.0.1:{self.scheduler.port}"
            else:
                config["nats"]["url"] = f"nats://127.0.0.1:{self._to_nats.get(name, self.nats).port}"
                config["slots"] = SLOTS
            self._file(name).write_text(json.dumps(config))
            pid = self._processes.pid(name)
            assert pid is not None
            changed[name] = pid
            kill(pid, signal.SIGTERM)
        await self._processes.all_ready(changed)

    def _file(self, name: str) -> Path:
        return self._home / "config" / f"{name}.json"

    def _config(self, name: str) -> dict[str, Any]:
        config: dict[str, Any] = json.loads(self._file(name).read_text())
        return config


class Echo:
    """Says again what executors said: pulls and reports twice, late and in another order, and false reports.

    False are: a session that never was, an attempt that never was, and a report by an executor that does not
    hold the attempt. Each would bring the output `FORGED`, which the oracle looks for.

    Args:
        home: of the installation.
        folder: outside of it, which is away at times; gets credentials.
        rng: seeded.

    Attributes:
        clocks: of executors, in seconds ahead of the true time, as their last reports had them.
        held: attempts of executors, as their last pulls had them.
    """

    def __init__(self, home: Path, folder: Path, rng: random.Random) -> None:
        self._home = home
        self._folder = folder
        self._rng = rng
        self._client: Client | None = None
        self._numbers = itertools.count()
        self._later: set[asyncio.Task[None]] = set()
        self._executors: list[str] = []
        self.clocks: dict[str, float] = {}
        self.held: dict[str, set[str]] = {}
        self.repeated = 0
        self.forged = 0

    async def __aenter__(self) -> "Echo":
        settings = json.loads((self._home / "hive.json").read_text())
        self._executors = [entry["id"] for entry in settings["executors"]]
        self._client = await connect(everything_in(self._home, self._folder), EVERYTHING)
        for kind in ("pull", "report"):
            await self._client.subscribe(f"hive.exec.*.{kind}", cb=self._heard)
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in list(self._later):
            task.cancel()
        await asyncio.gather(*self._later, return_exceptions=True)
        assert self._client is not None
        await self._client.close()

    async def _heard(self, message: Msg) -> None:
        _, _, executor, kind = message.subject.split(".")
        if ".echo" in message.reply:
            return
        body = json.loads(message.data)
        if kind == "report" and (ended := [us for one in body["reports"] if (us := one.get("ended_us"))]):
            self.clocks[executor] = max(ended) / 1e6 - time.time()
        if kind == "pull":
            self.held[executor] = {f"attempt {key['attempt']} of {key['task']}" for key in body.get("held", ())}
        if self._rng.random() < ECHO_SHARE:
            self._say_later(executor, kind, message.data, self._rng.uniform(0, ECHO_S if kind == "report" else 0.5))
        if self._rng.random() < FORGED_SHARE:
            self._forge(executor, kind, body)

    def _forge(self, executor: str, kind: str, body: dict[str, Any]) -> None:
        """Report on what an executor holds right now, or has just reported."""
        named = (
            body["reports"]
            if kind == "report"
            else [{**key, "session": body["session"]} for key in body.get("held", ())]
        )
        if named:
            others = [one for one in self._executors if one != executor]
            speaker, reports = forged(self._rng, executor, others, named)
            self.forged += len(reports)
            request = {"v": 1, "session": body["session"], "reports": reports}
            self._say_later(speaker, "report", json.dumps(request).encode(), 0)

    def _say_later(self, executor: str, kind: str, data: bytes, delay_s: float) -> None:
        async def say() -> None:
            await asyncio.sleep(delay_s)
            assert self._client is not None
            reply = f"_INBOX.{executor}.echo{next(self._numbers)}"
            if self._client.is_connected:
                await self._client.publish(f"hive.exec.{executor}.{kind}", data, reply=reply)
                self.repeated += 1

        task = asyncio.create_task(say())
        self._later.add(task)
        task.add_done_callback(self._later.discard)


def forged(
    rng: random.Random, executor: str, others: list[str], named: list[dict[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """Return who says it, and reports on the attempts of `named` that must not count."""
    how = rng.choice(["session", "attempt", "executor"])
    reports = []
    for report in named:
        changed = {**report, "status": "succeeded", "output": FORGED}
        if how == "session":
            changed["session"] = "forged-session"
        elif how == "attempt":
            changed["attempt"] = report["attempt"] + 100
        reports.append(changed)
    return rng.choice(others) if how == "executor" else executor, reports
