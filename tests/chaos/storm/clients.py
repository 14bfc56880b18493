"""Clients that submit while the storm goes on, and write down what they were told."""

import asyncio
import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from tests.chaos.storm.plan import Planned

SUBMIT_TIMEOUT_S = 15.0
AGAIN_S = 0.2
STEADY = 4
TRICKLE_S = 0.8
REFUSED = range(400, 500)


@dataclass
class Record:
    """What a client knows of one job.

    Attributes:
        jobs: ids it was told; more than one is a breach.
        acknowledged_at: when it was first told that the job is in.
        refused: the answer's status where the job was turned away for good.
        lost_answers: submits whose answer never came, or said that nobody knows.
        cancelled: a cancel was acknowledged.
    """

    planned: Planned
    jobs: set[str] = field(default_factory=set)
    acknowledged_at: float | None = None
    refused: int | None = None
    lost_answers: int = 0
    cancelled: bool = False

    @property
    def unknown(self) -> bool:
        """Nobody ever said whether the job is in."""
        return self.acknowledged_at is None and self.refused is None


class Clients:
    """Clients that take jobs from one plan while `pace` lets them, and some that never stop.

    Args:
        url: of the gateway.
        key: that it wants to see.
        plan: endless.
        trickle: the same, of what keeps coming whatever the pace.
        rng: seeded.

    Attributes:
        tasks: submitted so far by those who keep the pace, but for jobs that are cancelled or have no answer.
        pace: how many that may be by now.
        ended: set it, and no new job is begun.
    """

    def __init__(
        self, url: str, key: str, plan: Iterator[Planned], trickle: Iterator[Planned], rng: random.Random
    ) -> None:
        self._url = url
        self._headers = {"authorization": f"Bearer {key}"}
        self._plan = plan
        self._trickle = trickle
        self._rng = rng
        self.records: list[Record] = []
        self.tasks = 0
        self.pace = 0.0
        self.ended = False

    @property
    def lost_answers(self) -> int:
        """How many submits nobody answered for so far."""
        return sum(record.lost_answers for record in self.records)

    async def run(self, count: int) -> None:
        """Submit until `ended` is set; what has been begun is brought to its answer."""
        timeout = aiohttp.ClientTimeout(total=SUBMIT_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with (
            aiohttp.ClientSession(
                self._url, headers=self._headers, timeout=timeout, connector=connector
            ) as session,
            asyncio.TaskGroup() as group,
        ):
            for _ in range(count):
                group.create_task(self._client(session, group))
            for _ in range(STEADY):
                group.create_task(self._steady_client(session))

    async def _client(self, session: aiohttp.ClientSession, group: asyncio.TaskGroup) -> None:
        while not self.ended:
            if self.tasks >= self.pace:
                await asyncio.sleep(0.02)
                continue
            record = Record(next(self._plan))
            self.records.append(record)
            # Of a job that is cancelled nobody knows how many tasks it will come to.
            tasks = 0 if record.planned.cancel_after_s is not None else record.planned.tasks
            self.tasks += tasks
            await self._submit(session, record)
            if record.unknown:
                self.tasks -= tasks
            elif record.planned.cancel_after_s is not None:
                group.create_task(self._cancel(session, record))

    async def _steady_client(self, session: aiohttp.ClientSession) -> None:
        while not self.ended:
            record = Record(next(self._trickle))
            self.records.append(record)
            await self._submit(session, record)
            await asyncio.sleep(TRICKLE_S)

    async def _submit(self, session: aiohttp.ClientSession, record: Record) -> None:
        """Submit; with an idempotency key, until there is an answer that says what is."""
        headers = {"Idempotency-Key": record.planned.key} if record.planned.key else {}
        while record.unknown:
            if record.lost_answers:
                if not record.planned.key:
                    return
                await asyncio.sleep(AGAIN_S)
            try:
                async with session.post("/v1/jobs", json=record.planned.document, headers=headers) as answer:
                    told = await answer.json(content_type=None)
            except aiohttp.ClientConnectorError:
                await asyncio.sleep(AGAIN_S)  # nothing was sent
                continue
            except (aiohttp.ClientError, TimeoutError, ValueError):
                record.lost_answers += 1
                continue
            _note(record, answer.status, told)
        if record.planned.key and record.acknowledged_at is not None and self._rng.random() < 0.1:
            await self._submit_again(session, record, headers)

    async def _submit_again(self, session: aiohttp.ClientSession, record: Record, headers: dict[str, str]) -> None:
        """Ask for the same job once more, as a client does that has forgotten."""
        with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
            async with session.post("/v1/jobs", json=record.planned.document, headers=headers) as answer:
                _note(record, answer.status, await answer.json(content_type=None))

    async def _cancel(self, session: aiohttp.ClientSession, record: Record) -> None:
        assert record.planned.cancel_after_s is not None
        await asyncio.sleep(record.planned.cancel_after_s)
        job = min(record.jobs)
        while not record.cancelled:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with session.delete(f"/v1/jobs/{job}") as answer:
                    record.cancelled = answer.status == 202
            if not record.cancelled:
                await asyncio.sleep(AGAIN_S)


def _note(record: Record, status: int, told: Any) -> None:
    if status in (200, 201):
        record.jobs.add(told["job_id"])
        record.acknowledged_at = record.acknowledged_at or time.time()
    elif status in REFUSED and status not in (408, 429):
        record.refused = status
    else:
        record.lost_answers += 1
