"""What the oracle knows of jobs, tasks and attempts: a model of its own, from job documents and events."""

from typing import Any

from hive_common.contracts.events import RetryPolicy, StepJoined
from hive_common.contracts.judgement import Decision
from hive_common.contracts.limits import LEASE_MS

from .judged import MAKERS

LEASE_S = LEASE_MS / 1e3
CLOCK_US = 1_200_000
"""By so much may clocks differ before a plan moves along with them."""
ENDED = ("succeeded", "failed", "cancelled")


class Attempt:
    """An attempt, and where it was given to."""

    def __init__(self, executor: str, session: str, device: str) -> None:
        self.executor = executor
        self.session = session
        self.device = device
        self.status = "live"
        self.late = 0
        self.code = ""
        self.output: bytes = b""


class Step:
    """A task of a job document, by its words."""

    def __init__(self, words: dict[str, Any]) -> None:
        speculate, verify = words.get("speculate", {}), words.get("verify", {})
        quorum, join = verify.get("quorum", {}), words.get("join", "all")
        self.id: str = words["id"]
        self.needs: list[str] = words.get("needs", [])
        self.makes = words["agent"].partition("@")[0] in MAKERS
        self.is_fork = "fork" in words
        self.distinct: str = speculate.get("distinct", "device")
        self.keeps = speculate.get("keep") == "all"
        self.hedged = "hedge_after" in speculate
        self.adaptive: bool = quorum.get("adaptive", False)
        self.k: int = quorum.get("k", 1)
        self.of: int = quorum.get("of", speculate.get("replicas", 1))
        extends = quorum.get("on_none", "extend" if quorum else "fail") == "extend"
        self.most: int = quorum.get("extend_to", 2 * self.of) if extends else self.of
        equal = quorum.get("equal")
        asked = {"critic": verify.get("critic"), "test": verify.get("test"), "senior": verify.get("senior")}
        asked["pairs"] = equal.get("critic") if isinstance(equal, dict) else None
        self.judges: dict[str, str] = {kind: one["agent"] for kind, one in asked.items() if one is not None}
        self.filtered = bool(self.judges.keys() & {"critic", "test"})
        self.judged = self.of > 1 or self.filtered
        self.join: str = join if isinstance(join, str) else next(iter(join))
        self.top: int | None = join["rank"]["top"] if self.join == "rank" else None
        self.on_failure: str = words.get("on_failure", "fail")
        self.minimum: int = words.get("minimum", 0)
        self.is_joined = self.join != "all" or self.on_failure != "fail" or self.minimum > 0
        self.closes_early = self.join == "integrator" or self.on_failure != "fail"

        self.joined: StepJoined | None = None
        self.tasks: list[Task] = []
        self.judging: list[Task] = []

    def planned(self) -> int:
        """Return how many attempts a task is planned with; 0 where the first success decides."""
        if not self.judged:
            return 0
        return 1 if self.hedged or self.adaptive else self.of

    def is_done(self) -> bool:
        """Whether others may read what it gives."""
        if not self.is_joined:
            return all(task.status == "succeeded" for task in self.tasks)
        integrators = [task for task in self.judging if task.kind == "integrator"]
        if self.joined is None or bool(self.joined.task) != bool(integrators):
            return False
        return all(task.status == "succeeded" for task in integrators)


class Task:
    """A task, be it one of the job document, a judge or an integrator.

    Attributes:
        planned, replaced: attempts that may be made in all; those of them that stand in for one that ended.
        pauses: when those of them may begin that were not made yet.
        owed: the last one that ended has to be replaced, as the next thing that happens to the task.
        kind: how it judges, if it does; of which attempts of which task.
    """

    def __init__(self, job: "Job", step: Step, retry: RetryPolicy, ready: bool, planned: int) -> None:
        self.job = job
        self.step = step
        self.retry = retry
        self.status = "ready" if ready else "blocked"
        self.attempts: dict[int, Attempt] = {}
        self.failures = 0
        self.losses = 0
        self.not_before_us = 0
        self.ended_s = 0.0
        self.judged = planned > 0
        self.planned = planned
        self.replaced = 0
        self.pauses = [0] * planned
        self.owed = ""
        self.last = ""
        self.winner = 0
        self.decision: Decision | None = None
        self.kind = ""
        self.of: Task | None = None
        self.of_attempts: tuple[int, ...] = ()

    def live(self) -> list[int]:
        """Return the attempts that may still give something."""
        return [number for number, attempt in self.attempts.items() if attempt.status == "live"]

    def gave(self) -> list[int]:
        """Return the attempts that gave a result."""
        return [number for number, attempt in self.attempts.items() if attempt.status == "succeeded"]

    def needless_s(self) -> float:
        """Return since when nobody needs what it does; 0.0: somebody does."""
        found = [one for one in (self.ended_s, self.of.ended_s if self.of else 0.0, self.job.ended_s) if one]
        return min(found, default=0.0)


class Job:
    """A job."""

    def __init__(self, document: dict[str, Any], deadline_us: int) -> None:
        self.fan_out: int = document["limits"]["fan_out"]
        self.deadline_us = deadline_us
        self.generous = document["limits"]["deadline"].endswith("h")
        self.steps = {words["id"]: Step(words) for words in document["tasks"]}
        self.tasks: list[Task] = []
        self.cancelled = False
        self.end = ""
        self.ended_s = 0.0

    @property
    def closed(self) -> bool:
        """Whether a step was joined with what there was, because the time was running out."""
        return any(step.joined is not None and step.joined.closed for step in self.steps.values())

    def closes(self, now_us: int) -> bool:
        """Whether it takes no more results."""
        due = now_us + CLOCK_US >= self.deadline_us
        too_few = any(task.status == "failed" and task.step.minimum for task in self.tasks)
        return self.cancelled or due or too_few or any(breaks(task) for task in self.tasks)


def breaks(task: Task) -> bool:
    """Whether a task failed with which its job fails."""
    if task.status != "failed" or task.of is not None:
        return False
    return task.kind == "integrator" or task.step.on_failure == "fail"
