"""What a task asks of a device, as its job and the places of other attempts make it."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Final

import msgspec
from hive_common.contracts.events import AgentRef
from hive_common.contracts.jobdocument import Place
from hive_common.contracts.judgement import Distinct

from hive_scheduler.domain.jobfile import Step
from hive_scheduler.domain.placement import Apart, Need, Where
from hive_scheduler.domain.task import LIVE, AttemptState, TaskState

if TYPE_CHECKING:
    from hive_scheduler.domain.job import JobState

OWN_DEVICES: Final = "own-devices"


def need_of(job: "JobState", task: TaskState) -> Need:
    """Return what a task asks of a device now.

    A further attempt keeps away from where results of its task come from, or may still come from, as far as
    `distinct` says; a judge from where what it judges came from.
    """
    agent, step = job.agents[task.agent], job.steps[task.step].step
    if task.judging is not None:
        return _need_of_judge(job, task, agent, step)
    apart = None
    if task.judged is None and not job.canary:
        return plain_need(agent, step, job.owner, job.pin)
    if task.judged is not None and step.judging is not None:
        others = (one for one in task.attempts.values() if one.status in LIVE or one.status == "succeeded")
        apart = apart_from(step.judging.rule.distinct, others)
    need = base_need(agent, step, job.owner, job.pin, distinct_from=apart)
    # It is for machines that nobody knows yet, too, and holds nothing that its owner would not show them.
    return msgspec.structs.replace(need, low_trust=True) if job.canary else need


def _need_of_judge(job: "JobState", task: TaskState, agent: AgentRef, step: Step) -> Need:
    judging, words = task.judging, step.judging
    assert judging is not None
    apart = None
    if judging.task and words is not None:
        judged = job.tasks[judging.task]
        producers = (judged.attempts[number] for number in judging.attempts)
        apart = apart_from(words.rule.distinct, producers, judges=True)
    return judge_need(agent, step, job.owner, senior=judging.kind == "senior", distinct_from=apart)


def distinct_of(job: "JobState", task: TaskState) -> Distinct:
    """Return what attempts of a task must not have in common; `none` where it has one at a time."""
    words = job.steps[task.step].step.judging
    return "none" if task.judged is None or words is None else words.rule.distinct


def base_need(agent: AgentRef, step: Step, owner: str, pin: str, distinct_from: Apart | None = None) -> Need:
    """Return what any attempt of a step's tasks asks of a device."""
    return Need(
        agent.runtime,
        agent.memory_bytes,
        scratch_bytes=agent.scratch_bytes,
        distinct_from=distinct_from,
        place=where(step.place),
        owner=owner,
        low_trust=is_low_trust(step, pin),
    )


def plain_need(agent: AgentRef, step: Step, owner: str, pin: str) -> Need:
    """Return what a task of a step asks of a device whose result nobody judges: also one that another one forked.

    It is no work for machines that nobody knows, whatever becomes of the other tasks of its step.
    """
    return msgspec.structs.replace(base_need(agent, step, owner, pin), low_trust=False)


def judge_need(
    agent: AgentRef, step: Step, owner: str, *, senior: bool = False, distinct_from: Apart | None = None
) -> Need:
    """Return what a judge of a step, or its integrator, asks of a device.

    Nobody judges a judge: it is no work for machines that nobody knows. A senior agent is for a higher tier,
    whatever the step's own tasks run on.
    """
    place = where(step.place)
    if place is not None and senior and place.tier:
        place = Where("", place.executors, place.labels) if place.executors or place.labels else None
    return Need(
        agent.runtime,
        agent.memory_bytes,
        scratch_bytes=agent.scratch_bytes,
        distinct_from=distinct_from,
        place=place,
        owner=owner,
        senior=senior,
    )


def is_low_trust(step: Step, pin: str) -> bool:
    """Say whether a step's tasks may go to machines of others that nobody knows yet.

    They may where results are compared with those of others or tested, and the job's data is not kept at home.
    """
    words = step.judging
    return words is not None and (words.rule.k >= 2 or words.rule.tested) and pin != OWN_DEVICES


def where(place: Place) -> Where | None:
    """Return a step's `place` as placement compares it; None where it says nothing."""
    if place.tier is None and not place.executors and not place.labels:
        return None
    return Where(place.tier or "", frozenset(place.executors), frozenset(place.labels.items()))


def apart_from(distinct: Distinct, places: Iterable[AttemptState], *, judges: bool = False) -> Apart | None:
    """Return what keeps away from attempts, by `distinct`; None where nothing has to.

    What a judge keeps away from is what `hive_common.judgement.independence` refuses.
    """
    if distinct == "none":
        return None
    known = [*places]
    if not known:
        return None
    return Apart(
        executors=frozenset(one.executor for one in known),
        devices=frozenset(one.device for one in known) if distinct == "device" else frozenset(),
        owners=frozenset(one.owner for one in known) if distinct == "owner" else frozenset(),
        judges=judges,
    )
