"""Second attempts beside slow first ones: when they start, and how many of them there may be.

The rules are `hive_common.judgement.hedging`. All of it is in memory: a new leader learns anew how long attempts of
an agent take, and begins with a small budget.
"""

from typing import TYPE_CHECKING

from hive_common.contracts.events import TaskExtended
from hive_common.judgement.hedging import ExtraBudget, Kinds

from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.task import TaskState
from hive_scheduler.metrics import HEDGES

if TYPE_CHECKING:
    from hive_scheduler.engine import Engine


class Hedges:
    """Follows the attempts of hedged tasks, whose job says `speculate.hedge_after`.

    Args:
        engine: tells of attempts, has the timers, and decides.
    """

    def __init__(self, engine: "Engine") -> None:
        self._engine = engine
        self._kinds = Kinds()
        self._budget = ExtraBudget()
        self._since_us: dict[tuple[str, int], int] = {}

    def assigned(self, job: JobState, task: TaskState, attempt: int) -> None:
        """Begin to measure an attempt, and plan the one that is to start beside it if it is slow."""
        words = job.steps[task.step].step.judging
        if words is None or not words.hedged or task.judged is None:
            return
        now_us = self._engine.now_us()
        self._since_us[task.id, attempt] = now_us
        if attempt == 1:
            self._budget.first()
        after_us = self._kinds.hedge_after_us(task.agent, words.hedge_after_ms)
        if task.judged.planned - task.judged.replaced < words.rule.of and after_us is not None:
            self._engine.at(now_us + after_us, lambda: self._hedge(job, task, after_us))

    def _hedge(self, job: JobState, task: TaskState, after_us: int) -> None:
        now_us = self._engine.now_us()
        words = job.steps[task.step].step.judging
        assert words is not None and task.judged is not None
        # Those that this one was planned for may have ended, and others been made in their place.
        is_slow = any(self._since_us.get((task.id, one), now_us) <= now_us - after_us for one in task.live())
        if not is_slow or task.judged.planned - task.judged.replaced >= words.rule.of:
            return
        # One that has given its result is not slow: its judge is.
        if task.ended or job.closing(now_us) is not None or task.outputs or task.wanted or not task.live():
            return
        if not self._budget.take():
            HEDGES.labels("over_budget").inc()
            return
        HEDGES.labels("made").inc()
        self._engine.apply(job, task.id, [TaskExtended(1, "hedge", now_us)])

    def ended(self, job: JobState, task: TaskState, attempt: int) -> None:
        """Take note of how long an attempt took, where it gave a result."""
        since_us = self._since_us.pop((task.id, attempt), None)
        if since_us is not None and task.attempts[attempt].status == "succeeded":
            self._kinds.observe(task.agent, self._engine.now_us() - since_us)

    def task_ended(self, task: TaskState) -> None:
        """Take note of attempts that were cancelled, which count with the time that they had run."""
        for attempt in task.attempts:
            since_us = self._since_us.pop((task.id, attempt), None)
            if since_us is not None:
                self._kinds.observe(task.agent, self._engine.now_us() - since_us)
