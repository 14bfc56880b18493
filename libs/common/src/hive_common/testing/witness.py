"""Somebody who remembers what an installation acknowledged, and holds it to its word afterwards.

with Witness(installation, document) as witness:      # submits jobs, and listens to what executors are told
    witness.wait(jobs=20, outcomes=40)
    ...                                               # the fault
witness.check(installation)                           # fails where something acknowledged is gone
"""

import asyncio
import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import Any, NamedTuple, Self

import aiohttp
import msgspec
import nats
import nats.errors
import psycopg
from nats.aio.msg import Msg

from hive_common.bus.nats import connect
from hive_common.contracts.messages import EVENTS_STREAM, ReportReply, ReportRequest, report_subject
from hive_common.kernel.ids import new_id
from hive_common.testing.identities import EVERYTHING, everything_in
from hive_common.testing.installation import TERMINAL, Installation, wait_until

_OUTCOMES = {"succeeded": "AttemptSucceeded", "failed": "AttemptFailed"}
_RETRY_S = 0.2
_EVENTS_MAX = 1_000_000
_EVENTS = """
    SELECT e.stream, e.type, e.position, p.payload
    FROM log.events e LEFT JOIN log.payloads p USING (position)
    WHERE e.type = ANY(%s) ORDER BY e.position LIMIT %s
"""


class Outcome(NamedTuple):
    """An attempt whose report was answered with `accepted`."""

    task: str
    attempt: int


class Seen(NamedTuple):
    """The log, as far as it concerns what was acknowledged.

    Attributes:
        jobs: with a `JobSubmitted`.
        ends: how many terminal events each job and task has.
        outcomes: types of the events that record an attempt's outcome.
        tasks: ids of all tasks by job.
    """

    jobs: set[str]
    ends: dict[str, int]
    outcomes: dict[Outcome, str]
    tasks: dict[str, set[str]]


class Witness:
    """Submits one job after the other, and records which submits and which reports were acknowledged.

    A submit is acknowledged when its answer came; one without an answer is asked again under the same idempotency
    key for as long as the witness is there, and is `unknown` if none came at all. Reports are seen as the executor
    sees them: the request and the reply that says `accepted`, as they pass through NATS.

    Args:
        installation: is up.
        document: the job, with its input.
        in_flight: how many submits run at the same time.
        pause_s: how long each of them rests after an answer.
    """

    def __init__(
        self, installation: Installation, document: dict[str, Any], *, in_flight: int = 2, pause_s: float = 0.05
    ) -> None:
        settings = json.loads((installation.home / "hive.json").read_text())
        self._http = settings["endpoints"]["http"]
        self._key = (installation.home / "api-key").read_text().strip()
        self._nats = everything_in(installation.home)
        self._body = json.dumps(document).encode()
        self._in_flight = in_flight
        self._pause_s = pause_s
        self._stop = threading.Event()
        self._listening = threading.Event()
        self._asked: dict[str, dict[Outcome, str]] = {}
        self._thread = threading.Thread(target=self._watch, name="witness", daemon=True)
        self.jobs: dict[str, float] = {}
        """Acknowledged jobs, and when (monotonic seconds)."""
        self.outcomes: dict[Outcome, str] = {}
        """Acknowledged outcomes, `succeeded` or `failed`."""
        self.problems: list[Exception] = []
        self.refusals: set[str] = set()
        """Stable codes of the errors that submits got."""
        self.refused = 0
        """Submits that got an error for an answer, each time it came."""
        self.unknown = 0
        """Submits that never got an answer."""

    def __enter__(self) -> Self:
        self._thread.start()
        assert self._listening.wait(30), "the witness cannot listen to NATS"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if kind is None:
            self.leave()

    def leave(self) -> None:
        """Submit no more, listen no more."""
        self._stop.set()
        self._thread.join(30)
        assert not self._thread.is_alive()
        assert not self.problems, f"the witness itself failed: {self.problems}"

    def wait(self, *, jobs: int = 0, outcomes: int = 0, timeout_s: float = 60) -> None:
        """Wait until so many more jobs and outcomes were acknowledged from here on."""
        jobs, outcomes = len(self.jobs) + jobs, len(self.outcomes) + outcomes
        what = f"{jobs} jobs and {outcomes} outcomes are acknowledged"
        wait_until(lambda: len(self.jobs) >= jobs and len(self.outcomes) >= outcomes, timeout_s, what)

    def next_acknowledged(self, timeout_s: float = 120) -> float:
        """Wait for the next acknowledged job and return how many seconds that took."""
        before, begun = len(self.jobs), time.monotonic()
        wait_until(lambda: len(self.jobs) > before, timeout_s, "a job is acknowledged again")
        return max(self.jobs.values()) - begun

    def check(self, installation: Installation, timeout_s: float = 120) -> Seen:
        """Assert that everything acknowledged is there and ends exactly once, and that the log verifies.

        Waits until every acknowledged job has ended.

        Raises:
            AssertionError: says what is lost, doubled or stuck.
        """
        seen = read(installation)
        lost_jobs = set(self.jobs) - seen.jobs
        assert not lost_jobs, (
            f"{len(lost_jobs)} of {len(self.jobs)} acknowledged jobs are lost: {sorted(lost_jobs)}"
        )
        lost = {key: how for key, how in self.outcomes.items() if seen.outcomes.get(key) != _OUTCOMES[how]}
        assert not lost, f"{len(lost)} of {len(self.outcomes)} acknowledged outcomes are lost: {lost}"

        def ended() -> bool:
            nonlocal seen
            seen = read(installation)
            return all(job in seen.ends for job in self.jobs)

        wait_until(ended, timeout_s, "every acknowledged job has ended")
        streams = set(self.jobs).union(*(seen.tasks[job] for job in self.jobs))
        wrong = {stream: seen.ends.get(stream, 0) for stream in streams if seen.ends.get(stream, 0) != 1}
        assert not wrong, f"terminal events by stream: {wrong}"
        audit = installation.verify()
        assert audit["ok"], audit
        return seen

    # --- the thread ---

    def _watch(self) -> None:
        asyncio.run(self._run())

    async def _run(self) -> None:
        client = await connect(self._nats, EVERYTHING)
        await client.subscribe(report_subject("*"), cb=self._on_report)
        await client.subscribe("_INBOX.>", cb=self._on_reply)
        await client.flush()
        self._listening.set()
        async with aiohttp.ClientSession(headers={"authorization": f"Bearer {self._key}"}) as session:
            submitting = [asyncio.create_task(self._submit_all(session)) for _ in range(self._in_flight)]
            while not self._stop.is_set():
                await asyncio.sleep(0.05)
            for task in submitting:
                task.cancel()
            ends = await asyncio.gather(*submitting, return_exceptions=True)
            self.problems += [end for end in ends if isinstance(end, Exception)]
        await client.close()

    async def _submit_all(self, session: aiohttp.ClientSession) -> None:
        while True:
            self.unknown += 1
            job = await self._submit(session)
            self.jobs[job] = time.monotonic()
            self.unknown -= 1
            await asyncio.sleep(self._pause_s)

    async def _submit(self, session: aiohttp.ClientSession) -> str:
        headers = {"idempotency-key": new_id(), "content-type": "application/json"}
        while True:
            try:
                timeout = aiohttp.ClientTimeout(total=15)
                async with session.post(
                    f"{self._http}/v1/jobs", data=self._body, headers=headers, timeout=timeout
                ) as answer:
                    if answer.status in (200, 201):
                        job: str = (await answer.json())["job_id"]
                        return job
                    problem = await answer.json(content_type=None)
                    assert answer.status >= 500, f"{answer.status}: {problem}"
                    self.refusals.add(problem["code"])
                    self.refused += 1
            except (aiohttp.ClientError, TimeoutError, OSError):
                pass
            await asyncio.sleep(_RETRY_S)

    async def _on_report(self, message: Msg) -> None:
        request = msgspec.json.decode(message.data, type=ReportRequest)
        self._asked[message.reply] = {
            Outcome(one.task, one.attempt): one.status for one in request.reports if one.status in _OUTCOMES
        }

    async def _on_reply(self, message: Msg) -> None:
        asked = self._asked.pop(message.subject, None)
        if asked is None:
            return
        for result in msgspec.json.decode(message.data, type=ReportReply).results:
            key = Outcome(result.task, result.attempt)
            if result.verdict == "accepted" and key in asked:
                self.outcomes[key] = asked[key]


async def _ignore(_: Exception) -> None:
    """Disconnects are what the tests are about."""


def read(installation: Installation) -> Seen:
    """Read jobs, ends and outcomes from the log itself, past every view."""
    types = [*TERMINAL, "JobSubmitted", "TaskCreated", *_OUTCOMES.values()]
    jobs: set[str] = set()
    ends: dict[str, int] = {}
    outcomes: dict[Outcome, str] = {}
    tasks: dict[str, set[str]] = {}
    with psycopg.connect(installation.admin_dsn()) as conn:
        for stream, type_, _, payload in conn.execute(_EVENTS, (types, _EVENTS_MAX)):
            match type_:
                case "JobSubmitted":
                    jobs.add(stream)
                    tasks.setdefault(stream, set())
                case "TaskCreated":
                    tasks[json.loads(payload)["job"]].add(stream)
                case "AttemptSucceeded" | "AttemptFailed":
                    outcomes[Outcome(stream, json.loads(payload)["attempt"])] = type_
                case _:
                    ends[stream] = ends.get(stream, 0) + 1
    return Seen(jobs, ends, outcomes, tasks)


def published(installation: Installation) -> int:
    """Return the last position in HIVE_EVENTS; 0 while NATS cannot say."""
    config = everything_in(installation.home)

    async def ask() -> int:
        try:
            client = await nats.connect(
                config.url,
                user_credentials=config.credentials_file,
                allow_reconnect=False,
                error_cb=_ignore,
            )
        except (OSError, nats.errors.Error):
            return 0
        try:
            return int((await client.jetstream().stream_info(EVENTS_STREAM)).state.last_seq)
        except nats.errors.Error:
            return 0
        finally:
            await client.close()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, ask()).result()
