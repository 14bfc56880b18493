"""What runs while this process leads: built after the lock was won, torn down when anything of it fails."""

import asyncio
import logging
from collections.abc import Callable, Iterable
from typing import Any

import msgspec
import psycopg
from hive_common.artifacts.store import ArtifactStore
from hive_common.bus import nats as bus
from hive_common.bus.heads import concerns, head_announcer
from hive_common.contracts.limits import APPROVAL_MS
from hive_common.contracts.messages import (
    HEAD_SUBJECT,
    LEADER_SUBJECT,
    ApproveReply,
    ApproveRequest,
    LeaderAnnouncement,
    PullReply,
    PullRequest,
    ReportReply,
    ReportRequest,
)
from hive_common.control.kill_log import TYPES as KILL_TYPES
from hive_common.control.kill_log import KillLog
from hive_common.eventlog.log import LogWriter
from hive_common.eventlog.observed import observe_writer
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import body_of
from hive_common.ops.lifecycle import Stop
from hive_common.ops.log_metrics import LOG_HEAD, PROJECTION_LAG
from hive_common.permissions.tokens import Minter, Verifier
from nats.aio.client import Client
from nats.aio.msg import Msg

from hive_scheduler import metrics
from hive_scheduler.approvals import Approvals
from hive_scheduler.blobs import Blobs
from hive_scheduler.canaries import Canaries
from hive_scheduler.catalogue import TYPES, URGENT_TYPES, Catalogue
from hive_scheduler.commits import Committed, Committer
from hive_scheduler.database import Database
from hive_scheduler.dispatch import Dispatcher
from hive_scheduler.domain.placement import Fleet
from hive_scheduler.domain.task import LIVE, STATUSES
from hive_scheduler.engine import Engine
from hive_scheduler.feed import Feed
from hive_scheduler.hub import Hub
from hive_scheduler.kills import enforce
from hive_scheduler.permits import Permits
from hive_scheduler.recovery import recover
from hive_scheduler.reports import Reports
from hive_scheduler.reputation import Reputation
from hive_scheduler.submission import Specs, Submissions

log = logging.getLogger(__name__)

TICK_S = 0.1
TIMERS_S = 0.005
"""What is planned for a time waits no longer than this for others that are, and not for the next tick."""
MEASURE_S = 1.0
VIEWS_DELAY_S = 0.25
"""How long the views let events gather while nobody waits for them: what happens to a task within it is one row
written once."""
CATALOGUE_DELAY_S = 0.1
"""The same for executors and agents; who names an unknown one makes it look at once."""
HEAD_PAUSE_S = 0.02
"""Between two hints to other processes: under load one of them speaks for many commits."""


class _Later:
    """Sets an event a moment after the first call, so that what comes close together is one wake-up."""

    def __init__(self, event: asyncio.Event, delay_s: float) -> None:
        self._event = event
        self._delay_s = delay_s
        self._handle: asyncio.TimerHandle | None = None

    def __call__(self) -> None:
        if self._handle is None:
            self._handle = asyncio.get_running_loop().call_later(self._delay_s, self._set)

    def _set(self) -> None:
        self._handle = None
        self._event.set()


class Leader:
    """All of the scheduler's parts, wired, while it leads.

    Args:
        database: whose connection holds the leader's lock; this object closes it.
        epoch: of this leadership.
        client: connection to NATS.
        store: of blobs.
        ns, owner: of new jobs.
        clock: of this machine.
        stop: set when a part fails: the process has to end.
        lease_ms: how long attempts of an executor stay live without a pull.
        kill_public_key: verifies kill orders.
        minter: makes capability tokens.
        verifier: reads them.
        approval_ms: how long people may take to decide what attempts ask.
        chance: draws whose results are checked, and who gets canaries; from a seed in tests (Reputation, Canaries).
    """

    def __init__(
        self,
        database: Database,
        epoch: int,
        client: Client,
        store: ArtifactStore,
        ns: str,
        owner: str,
        clock: Clock,
        stop: Stop,
        lease_ms: int,
        kill_public_key: str = "",
        minter: Minter | None = None,
        verifier: Verifier | None = None,
        approval_ms: int = APPROVAL_MS,
        chance: Callable[[], float] | None = None,
    ) -> None:
        self._database = database
        self._client = client
        self._stop = stop
        self.epoch = epoch
        self.reader = database.reader()
        self.queries = database.queries(ns)
        self.hub = Hub()
        self.fleet = Fleet()
        self.specs = Specs()
        blobs = Blobs(store)
        self.engine = Engine(ns, clock, blobs)
        self.reputation = Reputation(ns, chance)
        self.engine.trust = lambda _, task, producer: self.reputation.trust_in(task, producer)
        self.engine.observe = self.reputation.observe_task
        self._catalogue_reader = database.reader()
        self.catalogue = Catalogue(
            self._catalogue_reader, self._executor_changed, self._signers_changed, self.reputation.trusted
        )
        self.kills = KillLog(self._catalogue_reader, ns, kill_public_key, lambda _: self._enforce())
        permits = Permits(self.catalogue, clock, minter, self.kills)
        self.dispatcher = Dispatcher(
            self.engine, self.fleet, self.catalogue, self.kills, permits, clock, epoch, lease_ms
        )
        self.approvals = Approvals(
            self.engine, self.dispatcher, permits, verifier, self.catalogue.is_revoked, approval_ms
        )
        self.reports = Reports(self.engine, blobs, self.reader, clock, self.catalogue.is_revoked, permits)
        self.submissions = Submissions(
            *(self.engine, self.catalogue, blobs, self.reader, clock, self.specs, ns, owner, self.kills, permits),
            devices=self.fleet.devices,
        )
        self.canaries = Canaries(
            *(ns, owner, self.engine, self.catalogue, self.submissions, self.reputation, clock, chance)
        )
        self.engine.answered = self.canaries.answered
        self.dispatcher.on_assign = self.canaries.consider
        self.reputation.on_standing = self.dispatcher.standing_changed
        self.dispatcher.standing_of = self.reputation.standing
        self._reputation_reader = database.reader()
        self.views_wake = asyncio.Event()
        self._views_later = _Later(self.views_wake, VIEWS_DELAY_S)
        self._catalogue_later = _Later(self.catalogue.wake, CATALOGUE_DELAY_S)
        self._views_reader = database.reader()
        self.feed = Feed(self._views_reader)
        self.views = database.views(self.feed, self.views_wake)
        self._tasks: list[asyncio.Task[None]] = []
        self._subscriptions: list[Any] = []
        self._writer: LogWriter | None = None

    async def start(self) -> None:
        """Recover from the log, then take over: announce, subscribe, decide what is due."""
        announce = head_announcer(self._client, pause_s=HEAD_PAUSE_S)
        self._writer = await self._database.writer(announce)
        observe_writer(self._writer)
        self.engine.committer = Committer(self._writer, self.dispatcher.seal, self._committed)
        await self.queries.open()
        await self.catalogue.catch_up()
        await self.kills.catch_up()
        fold, position = await recover(self._database.open_jobs(), self.reader, self.specs, self.engine.now_us())
        await self.reputation.load(self._database.records(), self.reader)
        await self.canaries.load(self.reader)
        for executor in self.reputation.executors():
            self.dispatcher.standing_changed(executor)
        self.hub.position = self.engine.committer.position = position
        self._take_over(fold.jobs.values())
        self.approvals.take_over()
        self.canaries.take_over(fold.jobs.values())
        for executor in self.catalogue.revoked():
            self.dispatcher.executor_changed(executor)
        self._enforce()
        self._run(self.engine.committer.run(), "committer")
        self._run(self._watch_writer(self._writer), "leadership")
        self._run(self.views.run(), "views")
        self._run(self._database.reputation(self._reputation_reader).run(), "reputation")
        self._run(self.catalogue.follow(), "catalogue")
        self._run(self.kills.follow(), "kill orders")
        self._run(self._tick(), "tick")
        self._run(self._timers(), "timers")
        self._subscriptions = [
            await self._client.subscribe(HEAD_SUBJECT, cb=self._on_head),
            await bus.respond(
                self._client, "hive.exec.*.pull", PullRequest, self.dispatcher.pull, _pull_error, self._known
            ),
            await bus.respond(
                self._client, "hive.exec.*.report", ReportRequest, self.reports.report, _report_error, self._known
            ),
            await bus.respond(
                *(self._client, "hive.exec.*.call.approve", ApproveRequest, self.approvals.ask, _approve_error),
                self._known,
            ),
        ]
        announcement = msgspec.json.encode(LeaderAnnouncement(epoch=self.epoch))
        await self._client.publish(LEADER_SUBJECT, announcement)
        self.engine.settle()
        metrics.LEADER.set(1)
        log.info("recovered %d open jobs up to position %d", len(self.engine.jobs), position)

    def _known(self) -> Iterable[str]:
        return self.catalogue.executors.keys()

    async def close(self) -> None:
        """Stop taking work, write what is decided, let go of the lock."""
        metrics.LEADER.set(0)
        for subscription in self._subscriptions:
            if not self._client.is_closed:
                await subscription.unsubscribe()
        await self.canaries.close()
        await self.engine.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.hub.close()
        if self._writer is not None:
            await self._writer.close()
        await self._database.close()
        await self.queries.close()
        for reader in (self.reader, self._catalogue_reader, self._views_reader, self._reputation_reader):
            await reader.close()

    def _take_over(self, recovered: Any) -> None:
        """Give every live attempt one fresh lease, queue what is ready, let every job look at what is due."""
        for job in recovered:
            self.engine.add(job)
            for task in job.tasks.values():
                if task.wanted:
                    self.engine.enqueue(job, task)
                for number, attempt in task.attempts.items():
                    if attempt.status in LIVE:
                        self.dispatcher.hold(attempt.executor, attempt.session, task, number)
                        self.engine.hedges.assigned(job, task, number, recovered=True)
            self.engine.poke(job.id)

    def _run(self, work: Any, name: str) -> None:
        task = asyncio.create_task(work, name=name)
        self._stop.guard(task)
        self._tasks.append(task)

    def _committed(self, batch: list[Committed]) -> None:
        self.hub.publish(batch)
        self.feed.put(batch)
        self._views_later()

    def _executor_changed(self, executor: str) -> None:
        self.dispatcher.executor_changed(executor)

    def _signers_changed(self) -> None:
        self.dispatcher.signers_changed()

    def _enforce(self) -> None:
        enforce(self.engine, self.dispatcher, self.kills)

    async def _on_head(self, message: Msg) -> None:
        if concerns(message.data, KILL_TYPES):
            self.kills.wake.set()
        if concerns(message.data, URGENT_TYPES):
            self.catalogue.wake.set()
        if concerns(message.data, TYPES):
            # Somebody else's events: ours are none of these, and the views have ours from memory.
            self._catalogue_later()
            self._views_later()

    async def _watch_writer(self, writer: LogWriter) -> None:
        await writer.failed.wait()
        raise psycopg.OperationalError("the connection that holds the leader's lock is gone")

    async def _tick(self) -> None:
        measured = 0.0
        loop = asyncio.get_running_loop()
        while True:
            self.dispatcher.tick()
            self.engine.tick()
            if loop.time() - measured >= MEASURE_S:
                measured = loop.time()
                self._measure()
            await asyncio.sleep(TICK_S)

    async def _timers(self) -> None:
        while True:
            await self.engine.timer_is_due()
            self.engine.tick()
            await asyncio.sleep(TIMERS_S)

    def _measure(self) -> None:
        totals: dict[str, int] = dict.fromkeys(STATUSES, 0)
        for job in self.engine.jobs.values():
            for state in job.steps.values():
                for name, count in state.counts.items():
                    totals[name] += count
        for name, count in totals.items():
            metrics.TASKS.labels(name).set(count)
        metrics.JOBS_OPEN.set(len(self.engine.jobs))
        PROJECTION_LAG.labels("jobs").set(self.views.lag)
        LOG_HEAD.set(max(self.engine.committer.position, self.views.head))


def _pull_error(error: BaseException) -> PullReply:
    return PullReply(error=body_of(error))


def _approve_error(error: BaseException) -> ApproveReply:
    return ApproveReply(error=body_of(error))


def _report_error(error: BaseException) -> ReportReply:
    return ReportReply(error=body_of(error))
