"""Ready tasks in the order in which they are placed: by priority, and in turns between jobs within one.

Tasks that ask for the same of a device wait together, so that when nothing can take the first of them, the
others are not even looked at, while tasks with other needs go on.
"""

from collections import OrderedDict, deque
from typing import Final

from hive_scheduler.domain.placement import Need

PRIORITIES: Final = ("high", "normal", "low")


class _Ring:
    """Queues of jobs that take turns."""

    def __init__(self) -> None:
        self.jobs: OrderedDict[str, deque[str]] = OrderedDict()

    def push(self, job: str, task: str) -> None:
        self.jobs.setdefault(job, deque()).append(task)

    def pop(self) -> tuple[str, str]:
        """Take the next task of the job whose turn it is."""
        job, queue = next(iter(self.jobs.items()))
        task = queue.popleft()
        if queue:
            self.jobs.move_to_end(job)
        else:
            del self.jobs[job]
        return job, task


class ReadyQueue:
    """Ready tasks that wait for a device. Tasks of a job that has ended are dropped with `drop_job`."""

    def __init__(self) -> None:
        self._rings: dict[str, OrderedDict[Need, _Ring]] = {name: OrderedDict() for name in PRIORITIES}
        self._size = 0

    def __len__(self) -> int:
        return self._size

    def push(self, priority: str, need: Need, job: str, task: str) -> None:
        """Put a task at the end of its job's queue."""
        rings = self._rings[priority]
        if need not in rings:
            rings[need] = _Ring()
        rings[need].push(job, task)
        self._size += 1

    def needs(self, priority: str) -> list[Need]:
        """Return the different needs that wait in a priority; the one served longest ago first."""
        return list(self._rings[priority])

    def peek(self, priority: str, need: Need) -> str | None:
        """Return the task that `pop` would take."""
        ring = self._rings[priority].get(need)
        return None if ring is None else next(iter(ring.jobs.values()))[0]

    def pop(self, priority: str, need: Need) -> tuple[str, str] | None:
        """Take (job, task) of the job whose turn it is, or None when none waits with this need."""
        rings = self._rings[priority]
        ring = rings.get(need)
        if ring is None:
            return None
        found = ring.pop()
        self._size -= 1
        if ring.jobs:
            rings.move_to_end(need)
        else:
            del rings[need]
        return found

    def drop_job(self, priority: str, job: str) -> None:
        """Forget every task of a job."""
        rings = self._rings[priority]
        for need in list(rings):
            dropped = rings[need].jobs.pop(job, None)
            if dropped is not None:
                self._size -= len(dropped)
                if not rings[need].jobs:
                    del rings[need]
