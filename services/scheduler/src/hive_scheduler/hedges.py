"""Second attempts beside slow first ones: when they start, and how many of them there may be.

The rules are `hive_common.judgement.hedging`. All of it is in memory: a new leader learns anew how long attempts of
an agent take, and begins with a small budget. How far attempts are, their executors tell it again.
"""

from typing import TYPE_CHECKING, Final

from hive_common.contracts.events import TaskExtended
from hive_common.judgement.hedging import ExtraBudget, Kinds, Running, needs_hedge

from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.task import TaskState
from hive_scheduler.metrics import HEDGES, MARKS

if TYPE_CHECKING:
    from hive_scheduler.engine import Engine

TOLD_AGAIN_US: Final = 1_000_000
"""Within this time a new leader is told how far attempts are, and hedges none for want of it."""


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
        self._done_permille: dict[tuple[str, int], int] = {}

    def assigned(self, job: JobState, task: TaskState, attempt: int, *, recovered: bool = False) -> None:
        """Begin to measure an attempt, and plan the one that is to start beside it if it is slow.

        Args:
            recovered: it began under another leader, and what it has said of its work is not known here.
        """
        words = job.steps[task.step].step.judging
        if words is None or not words.hedged or task.judged is None:
            return
        now_us = self._engine.now_us()
        self._since_us[task.id, attempt] = now_us
        if attempt == 1:
            self._budget.first()
        after_us = self._kinds.hedge_after_us(task.agent, words.hedge_after_ms)
        if after_us is not None and recovered and words.hedge_unless_permille:
            after_us = max(after_us, TOLD_AGAIN_US)
        if task.judged.planned - task.judged.replaced < words.rule.of and after_us is not None:
            self._engine.at(now_us + after_us, lambda: self._hedge(job, task, after_us))

    def marked(self, task: TaskState, attempt: int, done_permille: int) -> None:
        """Take note of how far an attempt is. Reports may come in another order than they were made."""
        key = task.id, attempt
        if key in self._since_us:
            MARKS.inc()
            self._done_permille[key] = max(done_permille, self._done_permille.get(key, 0))

    def _hedge(self, job: JobState, task: TaskState, after_us: int) -> None:
        now_us = self._engine.now_us()
        words = job.steps[task.step].step.judging
        assert words is not None and task.judged is not None
        # Those that this one was planned for may have ended, and others been made in their place.
        live = [self._running(task, one, now_us) for one in task.live()]
        is_slow = needs_hedge(live, after_us, words.hedge_unless_permille)
        if not is_slow or task.judged.planned - task.judged.replaced >= words.rule.of:
            return
        # One that has given its result is not slow: its judge is.
        if task.ended or job.closing(now_us) is not None or task.outputs or task.wanted:
            return
        if not self._budget.take():
            HEDGES.labels("over_budget").inc()
            return
        HEDGES.labels("made").inc()
        self._engine.apply(job, task.id, [TaskExtended(1, "hedge", now_us)])

    def _running(self, task: TaskState, attempt: int, now_us: int) -> Running:
        key = task.id, attempt
        return Running(now_us - self._since_us.get(key, now_us), self._done_permille.get(key, 0))

    def _forget(self, task: TaskState, attempt: int) -> int | None:
        self._done_permille.pop((task.id, attempt), None)
        return self._since_us.pop((task.id, attempt), None)

    def ended(self, job: JobState, task: TaskState, attempt: int) -> None:
        """Take note of how long an attempt took, where it gave a result."""
        since_us = self._forget(task, attempt)
        if since_us is not None and task.attempts[attempt].status == "succeeded":
            self._kinds.observe(task.agent, self._engine.now_us() - since_us)

    def task_ended(self, task: TaskState) -> None:
        """Take note of attempts that were cancelled, which count with the time that they had run."""
        for attempt in task.attempts:
            since_us = self._forget(task, attempt)
            if since_us is not None:
                self._kinds.observe(task.agent, self._engine.now_us() - since_us)
