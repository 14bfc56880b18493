"""How many tasks an executor may have waiting for its slots, so that these do not idle between two short ones.

A task that waits at one executor cannot run at another. So it waits only where it will start soon, by how long
agents usually take, and the last tasks of all wait nowhere.
"""

from collections.abc import Iterable
from typing import Final, NamedTuple

AHEAD_MS: Final = 500
"""A task is given out ahead where it will start within this time. Executors ask for less (their `prefetch_ms`), by
what they ran last; this keeps from them what takes longer, and is no narrower than that for more of the same."""
AGENTS_MAX: Final = 10_000
"""Agents whose usual time is remembered; the least recently seen one is forgotten."""
RISING: Final = 0.3
FALLING: Final = 0.1
"""What a new time counts. One that is longer is believed sooner: too few that wait cost a round trip, too many a
task's time."""
_MS_MIN: Final = 1.0


class Usual:
    """How long attempts of an agent usually have a slot. In memory: a new leader learns it anew."""

    def __init__(self, agents_max: int = AGENTS_MAX) -> None:
        self._agents: dict[str, float] = {}
        self._agents_max = agents_max

    def observe(self, agent: str, ms: float) -> None:
        """Take the time that an attempt had a slot."""
        ms = max(ms, _MS_MIN)
        known = self._agents.pop(agent, None)
        if known is not None:
            ms = known + (RISING if ms > known else FALLING) * (ms - known)
        self._agents[agent] = ms
        if len(self._agents) > self._agents_max:
            del self._agents[next(iter(self._agents))]

    def ms(self, agent: str) -> float | None:
        """Return an agent's usual time; None where no attempt of it has ended yet."""
        return self._agents.get(agent)

    def pace(self, agents: Iterable[str]) -> float:
        """Return how many slots a millisecond come free where attempts of these agents run."""
        return sum(pace_of(self._agents.get(agent)) for agent in agents)

    def __len__(self) -> int:
        return len(self._agents)


class Queue(NamedTuple):
    """What a task is one of: its agent's usual time, None where it is not known, and how many tasks are ready."""

    usual_ms: float | None
    ready: int


class Slots(NamedTuple):
    """Slots of executors that could have a task, and how many tasks these have, with those that wait there."""

    total: int
    tasks: int

    def with_one(self, before: "Slots", now: "Slots") -> "Slots":
        """Return these with what one of them has now instead of before."""
        return Slots(self.total + now.total - before.total, self.tasks + now.tasks - before.tasks)


NOTHING_AHEAD: Final = Queue(None, 0)
NO_SLOTS: Final = Slots(0, 0)


def pace_of(usual_ms: float | None) -> float:
    """Return how often in a millisecond a slot comes free in which such attempts run; never, as far as is known."""
    return 0.0 if usual_ms is None else 1.0 / usual_ms


def may_wait(queue: Queue, of_all: Slots) -> bool:
    """Say whether such a task may wait for a slot anywhere (`waiting_max`)."""
    return queue.usual_ms is not None and queue.ready + of_all.tasks > 2 * of_all.total


def waiting_max(queue: Queue, slots: int, pace: float, of_all: Slots) -> int:
    """Return how many tasks may wait at an executor, with one more of these.

    Args:
        slots, pace: of the executor, with what runs there now (`Usual.pace`).
        of_all: slots of all executors that could have the task.
    """
    if queue.usual_ms is None or not of_all.total:
        return 0
    soon = AHEAD_MS * min(pace, slots / queue.usual_ms)
    # Its share of all that there is, without what runs in its slots now and what they will take next: whoever comes
    # first must not have what others will ask for in a moment.
    share = (queue.ready + of_all.tasks) * slots / of_all.total - 2 * slots
    return max(0, int(min(soon, share)))
