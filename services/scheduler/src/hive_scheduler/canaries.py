"""Canaries in the leader: they are kept, given to executors among other tasks, and what comes back is judged.

Whether an executor is given one is decided when a real task of its agent is placed there; the canary follows by the
ordinary way of jobs, and recovery, views and the log know it like any other. Chance is drawn at the edge.
"""

import asyncio
import logging
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable
from random import SystemRandom
from typing import Final, Literal, cast

from hive_common.contracts import events, values
from hive_common.contracts.events import (
    AttemptFailed,
    AttemptSucceeded,
    CanaryAdded,
    CanaryJudged,
    CanaryRemoved,
    Event,
)
from hive_common.eventlog.log import LogReader, NewEvent
from hive_common.judgement.reputation import gets_canary
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import (
    Conflict,
    FailedPrecondition,
    HiveError,
    InvalidArgument,
    NotFound,
)
from hive_common.kernel.ids import derive_id
from hive_common.rpc.rules import KeyRules

from hive_scheduler.catalogue import Catalogue
from hive_scheduler.domain.canaries import (
    OF_AGENT_MAX,
    Canary,
    Like,
    answer_key,
    check_agent,
    document,
    ending_of,
    json_of,
)
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.task import TaskState
from hive_scheduler.engine import ACTOR, Engine
from hive_scheduler.reputation import Reputation
from hive_scheduler.submission import Submission, Submissions, check_caller

log = logging.getLogger(__name__)

CALLER: Final = "canary"
TYPES: Final = (CanaryAdded.__name__, CanaryRemoved.__name__)
PAGE_EVENTS: Final = 1_000
PAUSE_MS: Final = 180_000
"""An executor gets no other canary of the same agent for so long."""
GIVEN_MAX: Final = 10_000
"""Executors and agents of which it is remembered when they had their last one."""
SUBMITS_MAX: Final = 16
"""Canaries that are being submitted at the same time; what comes on top gets none."""


class Canaries:
    """What the leader knows of canaries.

    Args:
        ns, owner: of new events.
        engine: commits.
        catalogue: knows agents.
        submissions: takes their jobs.
        reputation: who gets one how often, and what is thought of executors after they have answered.
        clock: pauses run on its boot clock.
        chance: draws a number in [0, 1); without it one that nobody can foresee.
    """

    def __init__(
        self,
        ns: str,
        owner: str,
        engine: Engine,
        catalogue: Catalogue,
        submissions: Submissions,
        reputation: Reputation,
        clock: Clock,
        chance: Callable[[], float] | None = None,
    ) -> None:
        self._ns = ns
        self._owner = owner
        self._engine = engine
        self._catalogue = catalogue
        self._submissions = submissions
        self._reputation = reputation
        self._clock = clock
        self._chance = chance or SystemRandom().random
        self._known: dict[str, Canary] = {}
        self._versions: dict[str, int] = {}
        self._removed: dict[str, Canary] = {}
        self._of: defaultdict[str, dict[str, Canary]] = defaultdict(dict)
        self._given: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._open: dict[tuple[str, str], str] = {}
        self._submitting: set[asyncio.Task[None]] = set()

    async def load(self, reader: LogReader) -> None:
        """Read all of them from the log.

        Raises:
            Unavailable: the log cannot be read.
            UnknownEvent: an event that this code does not know.
        """
        position = 0
        while True:
            scan = await reader.scan(position, PAGE_EVENTS, types=TYPES)
            for stored in scan.events:
                if stored.ns == self._ns and stored.payload is not None:
                    event = events.decode(stored.type, stored.schema, stored.payload)
                    self._evolve(stored.stream, stored.version, event)
            position = scan.through
            if len(scan.events) < PAGE_EVENTS:
                return

    def take_over(self, jobs: Iterable[JobState]) -> None:
        """Note which executors still have one of an earlier leader."""
        for job in jobs:
            if job.canary:
                (step,) = job.spec.steps
                self._open[step.place.executors[0], step.agent] = job.id

    def _evolve(self, canary: str, version: int, event: Event) -> None:
        self._versions[canary] = version
        if isinstance(event, CanaryAdded):
            added = self._known[canary] = Canary.of(canary, event)
            self._of[added.agent][canary] = added
            self._removed.pop(canary, None)
        elif canary in self._known:
            gone = self._removed[canary] = self._known.pop(canary)
            del self._of[gone.agent][canary]

    # --- for people ---

    def all(self, agent: str = "") -> list[Canary]:
        """Return all of them, or those of one `name@version`, by agent."""
        return sorted(one for one in self._known.values() if agent in ("", one.agent))

    async def add(self, agent: str, given: bytes, answer: bytes, equal: str, caller: str) -> Canary:
        """Add one, and return it once that is committed. The same one again is the same.

        Raises:
            NotFound: there is no such agent.
            InvalidArgument: input or answer do not fit the agent, or are too large.
            FailedPrecondition: the agent does more than to compute, or was yanked.
            Conflict: the same input has another answer.
            ResourceExhausted: the agent has `OF_AGENT_MAX` of them.
        """
        check_caller(caller)
        if agent not in self._catalogue.agents:
            await self._catalogue.catch_up()
        ref = self._catalogue.agents.get(agent)
        if ref is None:
            raise NotFound(f"there is no agent {agent[:160]}; expected name@version", agent=agent[:160])
        if agent in self._catalogue.yanked:
            raise FailedPrecondition(f"{agent} was yanked: {self._catalogue.yanked[agent]}", agent=agent)
        check_agent(agent, ref)
        given, answer = json_of("input", given), json_of("answer", answer)
        for name, raw, check in (
            ("input", given, self._engine.schemas.input_of(ref)),
            ("answer", answer, self._engine.schemas.output_of(ref)),
        ):
            if (violation := check.violation(raw)) is not None:
                raise InvalidArgument(f"{name}: does not fit the schema of {agent}: {violation}", path=name)
        equal = equal or "json"
        key = answer_key(equal, answer)
        canary = derive_id("canary", self._ns, agent, values.digest_of(given))
        known = self._known.get(canary)
        if known is not None:
            if (known.key, known.equal) != (key, equal):
                raise Conflict(f"this input has another answer; remove canary {canary} first", canary=canary)
        else:
            if len(self._of[agent]) >= OF_AGENT_MAX:
                raise FailedPrecondition(f"{agent} has {OF_AGENT_MAX} canaries; remove one", agent=agent)
            spelt = cast(Literal["exact", "json"], equal)
            self._commit(canary, CanaryAdded(agent, values.inline(given), key, spelt), caller)
        await self._engine.committer.settled()
        return self._known.get(canary) or self._removed[canary]

    async def remove(self, canary: str, caller: str) -> Canary:
        """Give one to nobody any more, and return it once that is committed. Raises `NotFound`."""
        check_caller(caller)
        found = self._known.get(canary) or self._removed.get(canary)
        if found is None:
            raise NotFound(f"there is no canary {canary[:80]}", canary=canary[:80])
        if canary in self._known:
            self._commit(canary, CanaryRemoved(), caller)
        await self._engine.committer.settled()
        return found

    def _commit(self, canary: str, event: Event, caller: str) -> None:
        version = self._versions.get(canary, 0) + 1
        new = self._new_event(canary, version, event, caller or "anonymous")
        self._evolve(canary, version, event)
        self._engine.committer.stage((new,), (canary, version - 1))

    def _new_event(self, stream: str, version: int, event: Event, actor: str) -> NewEvent:
        return NewEvent(
            stream=stream,
            version=version,
            type=type(event).__name__,
            schema=events.SCHEMA,
            payload=events.encode(event),
            ts_us=self._clock.now_us(),
            actor=actor,
            owner=self._owner,
            ns=self._ns,
            correlation=stream,
        )

    # --- for executors ---

    def consider(self, executor: str, job: JobState, task: TaskState) -> None:
        """Have an executor given one, now and then, of the agent of a task that is placed there."""
        of_agent = self._of.get(task.agent)
        if not of_agent or job.canary or len(self._submitting) >= SUBMITS_MAX:
            return
        key, now_ms = (executor, task.agent), self._clock.boot_ms()
        if now_ms < self._given.get(key, now_ms - PAUSE_MS) + PAUSE_MS or self._is_open(key):
            return
        if not gets_canary(self._reputation.book(executor).record, self._chance()):
            return
        canary = [*of_agent.values()][int(self._chance() * len(of_agent))]
        self._given[key] = now_ms
        self._given.move_to_end(key)
        if len(self._given) > GIVEN_MAX:
            self._given.popitem(last=False)
        like = Like(executor, task.step, task.timeout_ms, job.priority)
        giving = asyncio.create_task(self._give(canary, like, KeyRules(job.pin, job.counts_only)))
        self._submitting.add(giving)
        giving.add_done_callback(self._submitting.discard)

    def _is_open(self, key: tuple[str, str]) -> bool:
        job = self._open.get(key)
        if job is not None and job not in self._engine.jobs:
            del self._open[key]
            return False
        return job is not None

    async def _give(self, canary: Canary, like: Like, rules: KeyRules) -> None:
        request = Submission(document(canary, like), canary.input, "", "", CALLER, rules, canary.id)
        try:
            submitted = await self._submissions.submit(request)
        except HiveError as error:
            log.info("canary %s is not given to executor %s: %s", canary.id, like.executor, error.message)
        else:
            self._open[like.executor, canary.agent] = submitted.job

    def answered(self, job: JobState, task: TaskState, event: Event) -> list[NewEvent]:
        """Judge by an event of a canary's task, and return what goes into the log with it (Engine.answered)."""
        canary = self._known.get(job.canary)
        if canary is None or not isinstance(event, AttemptSucceeded | AttemptFailed):
            return []
        ending = ending_of(canary, event)
        judged = CanaryJudged(task.attempts[event.attempt].executor, canary.agent, ending, task.id)
        self._reputation.observe_canary(judged)
        stream = derive_id("canary", task.id, str(event.attempt))
        return [self._new_event(stream, 1, judged, ACTOR)]

    async def close(self) -> None:
        """Submit no more."""
        for giving in self._submitting:
            giving.cancel()
        await asyncio.gather(*self._submitting, return_exceptions=True)
