"""Who gave valid and invalid results, as events tell it: what an event says of executors, and their records.

A canary judges by its answer alone, and says so itself.

A quorum judges whoever took part in it, and a test whoever it was asked about. Scores of critics and the choice
of a senior agent are opinions about results and no judgement of who made them. Nor does a quorum judge whose votes
need not come from different machines: who agrees with itself has shown nothing. Where one result was taken because
its executor is trusted, nothing was compared, and nobody is judged but by a test, where there is one.

The rules themselves stand in `hive_common.judgement.reputation`.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

import msgspec
from hive_common.contracts.events import AttemptLate, AttemptLost, Event, TaskDecided
from hive_common.contracts.judgement import Decision
from hive_common.judgement.quorum import Votes, sift
from hive_common.judgement.reputation import (
    AgentRecord,
    Ending,
    ExecutorRecord,
    Standing,
    evolve_agent,
    evolve_executor,
    standing,
)

AGENTS_MAX: Final = 200
"""Agents that are kept of one executor; the one of which nothing was heard for longest goes. Its totals stay."""

TELLING: Final = (TaskDecided, AttemptLost, AttemptLate)
"""Events of tasks that say something of executors."""

_LOST: Final = frozenset({"lease_expired", "session_ended", "overtime"})
"""Who gives an attempt back says so in time, and a kill order is nobody's fault."""


class Observation(NamedTuple):
    """One result more of an executor and an agent (`name@version`)."""

    executor: str
    agent: str
    ending: Ending


class Counts(msgspec.Struct, frozen=True, omit_defaults=True):
    """Results of an executor in all, of whatever agents."""

    valid: int = 0
    invalid: int = 0
    late: int = 0
    lost: int = 0


class Book(msgspec.Struct):
    """What is known of one executor. `agents`: the one that changed last stands last."""

    record: ExecutorRecord = ExecutorRecord()
    counts: Counts = Counts()
    agents: dict[str, AgentRecord] = {}

    @property
    def standing(self) -> Standing:
        """Whether it is new, known or in quarantine."""
        return standing(self.record)

    @property
    def in_a_row(self) -> int:
        """Valid results since the last invalid one, as far as judged results are kept."""
        judged = self.record.judged
        return next((back for back, valid in enumerate(reversed(judged)) if not valid), len(judged))

    def add(self, agent: str, ending: Ending) -> str | None:
        """Take one more result; return the agent that is dropped for it, if any."""
        self.record = evolve_executor(self.record, ending)
        self.counts = msgspec.structs.replace(self.counts, **{ending: getattr(self.counts, ending) + 1})
        self.agents[agent] = evolve_agent(self.agents.pop(agent, AgentRecord()), ending)
        if len(self.agents) <= AGENTS_MAX:
            return None
        dropped = next(iter(self.agents))
        del self.agents[dropped]
        return dropped


class Holder(NamedTuple):
    """Who had an attempt, and whether it was given up."""

    executor: str
    lost: bool = False


def observed(event: Event, agent: str, holder_of: Callable[[int], Holder | None]) -> Iterator[Observation]:
    """Yield what an event of a task says of executors.

    Args:
        event: any event of a task.
        agent: the task's, `name@version`.
        holder_of: returns who had an attempt of the task; None where it is not known.
    """
    match event:
        case TaskDecided():
            yield from _judged(event.decision, agent, compared=not event.trust)
        case AttemptLost() if event.reason in _LOST:
            holder = holder_of(event.attempt)
            if holder is not None:
                yield Observation(holder.executor, agent, "lost")
        case AttemptLate():
            holder = holder_of(event.attempt)
            # What was cancelled while it was on its way came in time: others were faster, or its job had ended.
            if holder is not None and holder.lost:
                yield Observation(holder.executor, agent, "late")


def _judged(decision: Decision, agent: str, compared: bool) -> Iterator[Observation]:
    rule = decision.rule
    compared = compared and rule.k > 1 and rule.distinct != "none"
    agreed: frozenset[int] = frozenset()
    valid: frozenset[int] = frozenset()
    if compared and decision.outcome == "decided" and decision.winner is not None:
        sifted = sift(rule, decision.candidates).valid
        valid = frozenset(one.attempt for one in sifted)
        agreed = Votes(rule, sifted, decision.pairs).equal_to(decision.winner)
    for one in decision.candidates:
        if rule.tested and one.passed is False:
            yield Observation(one.executor, agent, "invalid")
        elif one.attempt in valid:
            yield Observation(one.executor, agent, "valid" if one.attempt in agreed else "invalid")
        elif rule.tested and one.passed and rule.k == 1:
            yield Observation(one.executor, agent, "valid")
