"""The reputation of executors: what the leader knows of it, and the table that a new leader begins with.

The interface (`Reputation`, in memory; nothing here awaits but `load`):

    standing(executor) -> "new" | "known" | "quarantined"
    trust(executor, agent, chance) -> int | None     None: check the result; else valid results in a row of it
    refused(executor, executor_owner, task_owner, low_trust) -> "" | "quarantined" | "new_executor"
    book(executor) -> Book                           counts, record and agents, to be shown
    chance() -> float                                a fresh number for one decision; from a seed in tests
    observe_task(task, event)                        what the engine decides (domain.reputation.TELLING), at once
    observe_canary(event)                            what an answer to a canary says, at once
    trust_in(task, producer) -> int | None           `trust` with a number drawn once for this result
    trusted(executor, position)                      a person took it out of quarantine (ExecutorTrusted)
    on_standing: Callable[[str], None]               called when the standing of an executor has changed; while a
                                                     decision is applied, so it MUST NOT decide

The table is written beside the views by a projection of its own, `ReputationProjection`, from the log alone. The
leader loads it, folds what lies between it and the log's head by the same code, and from then on every event that
the engine applies. What a person says comes from the log a moment later: a result that is decided within that
moment may count in memory before what the log has it count after; the table, and the next leader, have the log's
order.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from random import SystemRandom
from typing import Final, NamedTuple, Protocol

from hive_common.contracts import events
from hive_common.contracts.events import (
    AttemptLost,
    CanaryJudged,
    Event,
    ExecutorTrusted,
    TaskAssigned,
    TaskCreated,
)
from hive_common.contracts.judgement import Producer
from hive_common.eventlog.log import LogReader, Stored
from hive_common.judgement import reputation as rules
from hive_common.judgement.reputation import Access, AgentRecord, Standing

from hive_scheduler.domain.reputation import TELLING, Book, Holder, Observation, observed
from hive_scheduler.domain.task import TaskState

log = logging.getLogger(__name__)

TYPES_OF_TASKS: Final = tuple(one.__name__ for one in TELLING)
TYPES: Final = (*TYPES_OF_TASKS, CanaryJudged.__name__, ExecutorTrusted.__name__)
PAGE_EVENTS: Final = 1_000
DRAWN_MAX: Final = 10_000
"""Results for which a number has been drawn; most are decided at once."""
TASKS_PAGE: Final = 50
"""Tasks whose agent and executors are read from the log at once: their inputs come along."""


class Told(NamedTuple):
    """What an event says: results of executors, or that a person trusts one anew."""

    ns: str
    position: int
    observations: list[Observation]
    trusted: str | None


class Records(Protocol):
    """Port to the table, as a new leader reads it."""

    async def load(self, ns: str) -> tuple[int, dict[str, Book]]:
        """Return the books of a namespace by executor, and the position of the log that they stand for."""
        ...


class Reputation:
    """What the leader knows of executors.

    Args:
        ns: whose events count.
        chance: draws a number in [0, 1); without it one that nobody can foresee.
    """

    def __init__(self, ns: str, chance: Callable[[], float] | None = None) -> None:
        self._ns = ns
        self.chance = chance or SystemRandom().random
        self.on_standing: Callable[[str], None] = lambda _: None
        self.position = 0
        self._books: dict[str, Book] = {}
        self._drawn: OrderedDict[tuple[str, int], float] = OrderedDict()

    async def load(self, records: Records, reader: LogReader) -> None:
        """Begin with the table, and fold what the log has after it.

        Raises:
            Unavailable: the log cannot be read.
            UnknownEvent: an event that this code does not know.
        """
        self.position, self._books = await records.load(self._ns)
        while True:
            scan = await reader.scan(self.position, PAGE_EVENTS, types=TYPES, known=tuple(events.TYPES))
            for told in await told_of(reader, scan.events):
                if told.ns == self._ns:
                    fold(self._books, told)
            self.position = scan.through
            if len(scan.events) < PAGE_EVENTS:
                return

    def book(self, executor: str) -> Book:
        """Return what is known of an executor; of one that nobody has judged, nothing."""
        return self._books.get(executor) or Book()

    def executors(self) -> Iterable[str]:
        """Return all executors of which something is known."""
        return self._books.keys()

    def standing(self, executor: str) -> Standing:
        """Say whether an executor is new, known or in quarantine."""
        return self.book(executor).standing

    def trust(self, executor: str, agent: str, chance: float) -> int | None:
        """Return how many valid results in a row an executor is trusted for; None where the result is checked.

        Args:
            executor: made the result.
            agent: `name@version`.
            chance: drawn for this decision alone.
        """
        book = self.book(executor)
        record = book.agents.get(agent, AgentRecord())
        return None if rules.is_checked(record, book.record, chance) else record.in_a_row

    def refused(self, executor: str, executor_owner: str, task_owner: str, low_trust: bool) -> Access:
        """Say why an executor may not have a task (hive_common.judgement.reputation.refused)."""
        return rules.refused(self.book(executor).record, executor_owner, task_owner, low_trust)

    def observe(self, event: Event, agent: str, holder_of: Callable[[int], Holder | None]) -> None:
        """Take what an event of a task says of executors (domain.reputation.observed)."""
        for one in observed(event, agent, holder_of):
            self._take(one)

    def observe_canary(self, event: CanaryJudged) -> None:
        """Take what an executor's answer to a canary says of it."""
        self._take(Observation(event.executor, event.agent, event.ending))

    def _take(self, one: Observation) -> None:
        book = self._books.setdefault(one.executor, Book())
        before = book.standing
        book.add(one.agent, one.ending)
        if book.standing != before:
            log.info("executor %s is %s, and was %s", one.executor, book.standing, before)
            self.on_standing(one.executor)

    def observe_task(self, task: TaskState, event: Event) -> None:
        """Take an event that was applied to a task."""

        def holder_of(attempt: int) -> Holder:
            known = task.attempts[attempt]
            return Holder(known.executor, known.status == "lost")

        self.observe(event, task.agent, holder_of)

    def trust_in(self, task: TaskState, producer: Producer) -> int | None:
        """Decide whether a result is checked (domain.job.Inputs.trust).

        The number is drawn once for a result, however often this is asked while the result waits for its test: who
        draws often enough is checked always.
        """
        key = task.id, producer.attempt
        if key not in self._drawn:
            self._drawn[key] = self.chance()
            if len(self._drawn) > DRAWN_MAX:
                self._drawn.popitem(last=False)
        return self.trust(producer.executor, task.agent, self._drawn[key])

    def trusted(self, executor: str, position: int) -> None:
        """Begin new records of an executor, as a person said in the log at `position`."""
        if position > self.position and self._books.pop(executor, None) is not None:
            self.on_standing(executor)


# --- folding the log ---------------------------------------------------------------------------------------


async def told_of(reader: LogReader, batch: Sequence[Stored]) -> list[Told]:
    """Return what events say. Those whose payload is gone, or the payload of whose task, say nothing.

    Raises:
        UnknownEvent: an event that this code does not know (law 11).
        Unavailable: the log cannot be read.
    """
    for stored in batch:
        events.kind_of(stored.type, stored.schema)
    of_tasks = {stored.stream: None for stored in batch if stored.type in TYPES_OF_TASKS}
    known = await _tasks_of(reader, list(of_tasks))
    told: list[Told] = []
    for stored in batch:
        if stored.type == ExecutorTrusted.__name__:
            told.append(Told(stored.ns, stored.position, [], stored.stream))
        elif stored.type == CanaryJudged.__name__:
            told.append(Told(stored.ns, stored.position, _of_canary(stored), None))
        elif stored.payload is not None and stored.stream in known:
            agent, attempts = known[stored.stream]
            event = events.decode(stored.type, stored.schema, stored.payload)
            observations = [*observed(event, agent, attempts.get)]
            told.append(Told(stored.ns, stored.position, observations, None))
    return told


def _of_canary(stored: Stored) -> list[Observation]:
    if stored.payload is None:
        return []
    event = events.decode(stored.type, stored.schema, stored.payload)
    assert isinstance(event, CanaryJudged)
    return [Observation(event.executor, event.agent, event.ending)]


async def _tasks_of(reader: LogReader, streams: list[str]) -> dict[str, tuple[str, dict[int, Holder]]]:
    """Return the agent of each task, and who had each attempt."""
    found: dict[str, tuple[str, dict[int, Holder]]] = {}
    types = (TaskCreated.__name__, TaskAssigned.__name__, AttemptLost.__name__)
    for first in range(0, len(streams), TASKS_PAGE):
        page = streams[first : first + TASKS_PAGE]
        position = 0
        while stored := await reader.read(position, PAGE_EVENTS, types=types, streams=page):
            for one in stored:
                event = None if one.payload is None else events.decode(one.type, one.schema, one.payload)
                if isinstance(event, TaskCreated):
                    found[one.stream] = event.agent, {}
                elif isinstance(event, TaskAssigned) and one.stream in found:
                    found[one.stream][1][event.attempt] = Holder(event.executor)
                elif isinstance(event, AttemptLost) and one.stream in found:
                    attempts = found[one.stream][1]
                    if event.attempt in attempts:
                        attempts[event.attempt] = Holder(attempts[event.attempt].executor, lost=True)
            position = stored[-1].position
            if len(stored) < PAGE_EVENTS:
                break
    return found


def fold(books: dict[str, Book], told: Told) -> list[tuple[str, str, str | None]]:
    """Apply what one event says to books by executor.

    Returns:
        Of each result: its executor, its agent, and the agent that was dropped for it.
    """
    if told.trusted is not None:
        books.pop(told.trusted, None)
    return [
        (one.executor, one.agent, books.setdefault(one.executor, Book()).add(one.agent, one.ending))
        for one in told.observations
    ]
