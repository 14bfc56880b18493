"""What must hold of tasks whose results are judged, of their judges, and of joins. A part of the oracle."""

from collections import Counter
from collections.abc import Callable

import msgspec
from hive_common.contracts import events
from hive_common.contracts.events import Event
from hive_common.contracts.judgement import Decision
from hive_common.contracts.limits import LOST_ATTEMPTS_MAX
from hive_common.contracts.values import digest_of
from hive_common.eventlog.log import Stored
from hive_common.judgement.record import Same, recompute
from hive_common.judgement.reputation import TRUSTED_AFTER

from .judged import are_equal, is_honest
from .model import Attempt, Job, Step, Task

HEDGES_FLOOR, HEDGES_SHARE = 10, 0.1
FAILED = ("no_quorum", "contested", "no_valid_result")
UNDECIDED = ("judge_failed", "invalid_module", "invalid_input", "permission_denied", "killed")
"""A judged task may fail with these without a decision."""


class Jury:
    """Checks what is done with results.

    Args:
        found: takes what does not hold.
    """

    def __init__(self, found: Callable[[str], None]) -> None:
        self._found = found
        self.devices: dict[str, str] = {}
        self._hedges: Counter[int] = Counter()
        self._firsts = 0

    # --- where attempts go ---

    def assigned(self, task: Task, event: events.TaskAssigned, what: str) -> None:
        """Check an assignment of a judged task or of a judge, before it is taken over."""
        if self.devices[event.executor] != event.device:
            self._found(f"{what}: on device {event.device}, and its executor has {self.devices[event.executor]}")
        if task.of is not None:
            there = [task.of.attempts[number] for number in task.of_attempts]
            self._apart(task.of.step, event, there, f"{what}, a judge ({task.kind})")
        elif task.judged:
            if len(task.attempts) >= task.planned:
                self._found(f"{what}: attempt {event.attempt}, and {task.planned} are planned")
            there = [one for one in task.attempts.values() if one.status in ("live", "succeeded")]
            self._apart(task.step, event, there, what)
            if task.step.hedged and event.attempt == 1:
                self._firsts += 1

    def _apart(self, step: Step, event: events.TaskAssigned, there: list[Attempt], what: str) -> None:
        if step.distinct == "none":
            return
        if any(one.executor == event.executor for one in there):
            self._found(f"{what}: on the executor of another one that it has to be apart from")
        elif step.distinct == "device" and any(one.device == event.device for one in there):
            self._found(f"{what}: on the device of another one that it has to be apart from")

    # --- more attempts ---

    def extended(self, task: Task, stored: Stored, event: events.TaskExtended, epoch: int, what: str) -> None:
        """Check and take over what more is planned."""
        if not task.judged or event.attempts < 1 or task.status not in ("ready", "active"):
            self._found(f"{what}: {event.attempts} of a task that is {task.status}")
        if event.reason in ("retry", "lost"):
            if task.owed != event.reason or event.attempts != 1:
                self._found(f"{what}: {event.attempts} for `{event.reason}` after {task.last}")
            task.replaced += event.attempts
        task.owed = ""
        task.planned += event.attempts
        task.pauses = sorted([*task.pauses, *[event.not_before_us] * event.attempts])
        step = task.step
        if task.planned - task.replaced > step.most:
            self._found(
                f"{what}: {task.planned - task.replaced} attempts and {task.replaced} replacements of {step.most}"
            )
        if event.reason == "hedge":
            self._hedges[epoch] += 1
            # A new leader counts those anew that run when it comes.
            most = HEDGES_FLOOR + HEDGES_SHARE * self._firsts
            if self._hedges[epoch] > most:
                self._found(f"{what}: {self._hedges[epoch]} hedges, and {most:.1f} is the budget")
            if not step.hedged or task.gave() or not task.live():
                self._found(f"{what}: of a task that has results, or nobody at work")
        if event.reason == "check" and not step.adaptive:
            self._found(f"{what}: nobody asked for it")

    def owes(self, task: Task, code: str) -> str:
        """Return how an attempt that has just ended without a result is replaced; empty where it is not."""
        retry = task.retry
        if code in ("lost", "runner_died"):
            return "lost" if task.losses <= LOST_ATTEMPTS_MAX else ""
        may = task.failures < retry.max_attempts and code not in UNDECIDED
        return "retry" if may and (not retry.codes or code in retry.codes) else ""

    # --- judges ---

    def created(self, task: Task, event: events.TaskCreated, tasks: dict[str, Task], what: str) -> None:
        """Check a new judge, and take over whom it judges."""
        judging, step = event.judging, task.step
        assert judging is not None
        task.kind, task.of_attempts = judging.kind, judging.attempts
        if judging.kind == "integrator":
            if (
                step.joined is None
                or step.joined.task == ""
                or any(one.kind == "integrator" for one in step.judging)
            ):
                self._found(f"{what}: an integrator of a step that is not joined, or has one")
            return
        of = task.of = tasks[judging.task]
        if not of.judged or of.status != "active" or step.judges.get(judging.kind) != event.agent:
            self._found(f"{what}: {judging.kind} by {event.agent} of a task that is {of.status}")
        if not set(judging.attempts) <= set(of.gave()):
            self._found(f"{what}: of attempts {judging.attempts}, and {of.gave()} gave results")
        twice = [one for one in step.judging if one.of is of and (one.kind, one.of_attempts) == judging_key(task)]
        if twice:
            self._found(f"{what}: {judging.kind} of {judging.attempts} for the second time")

    # --- decisions ---

    def decided(self, task: Task, stored: Stored, event: events.TaskDecided, what: str) -> None:
        """Check a decision against what was really given, and by whom."""
        made, step = event.decision, task.step
        task.decision = made
        if recompute(made) != Same():
            self._found(f"{what}: {recompute(made)}")
        if not task.judged or made.task != stored.stream:
            self._found(f"{what}: of {made.task[-6:]}")
        for one in (*made.candidates, *made.running):
            at = task.attempts[one.attempt]
            if (one.executor, one.device) != (at.executor, at.device):
                self._found(f"{what}: attempt {one.attempt} is said to be of another executor")
        for one in made.candidates:
            if one.digest != digest_of(task.attempts[one.attempt].output):
                self._found(f"{what}: attempt {one.attempt} gave something else")
        there = [one.attempt for one in made.candidates], [one.attempt for one in made.running]
        if there != (sorted(task.gave()), sorted(task.live())):
            self._found(f"{what}: results and running are {there}, and really {task.gave(), task.live()}")
        if made.coming != task.planned - len(task.attempts):
            self._found(f"{what}: {made.coming} are coming, and really {task.planned - len(task.attempts)}")
        if event.trust and (not step.adaptive or event.trust < TRUSTED_AFTER or len(made.candidates) != 1):
            self._found(f"{what}: a trust of {event.trust} decides over {len(made.candidates)}")
        if made.rule.distinct != step.distinct or made.rule.k != (1 if event.trust else step.k):
            self._found(f"{what}: by {made.rule}, and {step.k} distinct by {step.distinct} were asked for")
        self._winner(task, made, event.trust, what)

    def _winner(self, task: Task, made: Decision, trust: int, what: str) -> None:
        step, said = task.step, {n: msgspec.json.decode(task.attempts[n].output) for n in task.gave()}
        if made.outcome == "kept" and made.winner is None and step.keeps:
            if step.filtered and not all(is_honest(said[one]) for one in made.votes):
                self._found(f"{what}: a lie passes")
        elif made.outcome == "decided" and made.winner is not None:
            alike = {one for one, output in said.items() if are_equal(output, said[made.winner])}
            votes = {_unit(step, one, task.attempts[one]) for one in made.votes}
            if len(votes) < made.rule.k or len(votes) < len(made.votes):
                self._found(f"{what}: {len(votes)} votes, and {made.rule.k} are needed")
            if made.rule.k > 1 and not alike.issuperset(made.votes):
                self._found(f"{what}: votes {made.votes} that are not equal to that of {made.winner}")
            if (made.rule.k > 1 or step.filtered) and not is_honest(said[made.winner]):
                self._found(f"{what}: a lie wins")

    def ends(self, task: Task, event: Event, what: str) -> None:
        """Check how a judged task ends: as was decided directly before."""
        made = task.decision
        if isinstance(event, events.TaskCancelled):
            return
        if made is None:
            if not (isinstance(event, events.TaskFailed) and event.code in UNDECIDED):
                self._found(f"{what}: nothing was decided")
            return
        if task.last != "TaskDecided":
            self._found(f"{what}: after {task.last}, and not after its decision")
        if isinstance(event, events.TaskSucceeded):
            winner = made.votes[0] if made.outcome == "kept" else made.winner
            if winner != event.attempt or made.outcome == "failed":
                self._found(f"{what}: by attempt {event.attempt}, and decided was {made.outcome}: {winner}")
        elif isinstance(event, events.TaskFailed):
            codes = FAILED if made.candidates else (*FAILED, *(one.code for one in task.attempts.values()))
            if made.winner is not None or made.outcome in ("decided", "kept") or event.code not in codes:
                self._found(f"{what}: with {event.code}, and decided was {made.outcome}")

    # --- joins ---

    def joined(self, job: Job, event: events.StepJoined, what: str) -> None:
        """Check what became of the results of a step, and take it over."""
        step = job.steps[event.step]
        if step.joined is not None or not step.is_joined or step.join != event.kind:
            self._found(f"{what}: `{event.step}` by {event.kind}, again, or though nobody asked for it")
        step.joined = event
        unended = [one for one in (*step.tasks, *step.judging) if one.status in ("blocked", "ready", "active")]
        if unended:
            self._found(f"{what}: `{event.step}` before {len(unended)} of its tasks have ended")
        good = {index for index, task in enumerate(step.tasks) if task.status == "succeeded"}
        if step.keeps and not step.is_fork:
            good = set(step.tasks[0].gave()) if step.tasks else set()
        if not set(event.order) <= good | set(event.defaulted) or len(set(event.order)) < len(event.order):
            self._found(f"{what}: {event.order} go on, and {sorted(good)} succeeded")
        if good & {*event.missing, *event.defaulted} and not (step.keeps and not step.is_fork):
            self._found(
                f"{what}: {event.missing} or {event.defaulted} would be missing, and {sorted(good)} succeeded"
            )
        if len(good) < step.minimum or (event.closed and not step.closes_early):
            self._found(f"{what}: with {len(good)} of {step.minimum} at least, closed {event.closed}")
        if bool(event.task) != (step.join == "integrator") or (event.defaulted and step.on_failure != "default"):
            self._found(f"{what}: not as its words say")
        if event.missing and step.on_failure == "fail" and not event.closed and not step.keeps:
            self._found(f"{what}: without {event.missing}, and nothing of it may fail")
        if event.kind == "rank":
            self._ranked(step, event, what)
        if (
            event.kind == "vote"
            and step.is_fork
            and step.makes
            and step.of == 1
            and event.order
            and not event.defaulted
        ):
            self._voted(step, event, what)

    def _ranked(self, step: Step, event: events.StepJoined, what: str) -> None:
        def score(number: int) -> float:
            made = step.tasks[0 if step.keeps else number].decision
            if made is None:
                return float("-inf")
            attempt = number if step.keeps else made.winner
            return next((one.score or 0.0 for one in made.candidates if one.attempt == attempt), float("-inf"))

        scores = [score(number) for number in event.order if number not in event.defaulted]
        if scores != sorted(scores, reverse=True) or (step.top is not None and len(event.order) > step.top):
            self._found(f"{what}: {event.order} with scores {scores}, {step.top} at most")

    def _voted(self, step: Step, event: events.StepJoined, what: str) -> None:
        said = {
            index: msgspec.json.decode(task.attempts[task.winner].output)
            for index, task in enumerate(step.tasks)
            if task.status == "succeeded" and task.winner
        }
        counts = {index: sum(are_equal(one, other) for other in said.values()) for index, one in said.items()}
        if counts and counts[event.order[0]] < max(counts.values()):
            self._found(f"{what}: {event.order[0]} wins with {counts[event.order[0]]} votes of {counts}")

    def reads(self, task: Task, what: str) -> None:
        """Check that what a task reads is there when it gets its input."""
        for need in task.step.needs:
            if not task.job.steps[need].is_done():
                self._found(f"{what}: has its input, and `{need}` is not done")


def judging_key(task: Task) -> tuple[str, tuple[int, ...]]:
    """Return what a judge judges, within its judged task."""
    return task.kind, task.of_attempts


def _unit(step: Step, number: int, attempt: Attempt) -> str:
    if step.distinct == "none":
        return str(number)
    return attempt.executor if step.distinct == "executor" else attempt.device
