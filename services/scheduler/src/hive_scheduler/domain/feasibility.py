"""Whether the machines that there are could ever do a job: its `place`, and as many distinct ones as it asks for.

Decided at submit, and of what tasks fork when they do, from executors that are neither revoked nor stopped, whether
they are online or not. What becomes of machines that leave later says `shortage`; plain tasks without `place` wait
for machines as they always did.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Final, NoReturn

from hive_common.artifacts.documents import nearest, refuse
from hive_common.contracts.events import AgentRef
from hive_common.contracts.judgement import Distinct, JudgeKind, Producer
from hive_common.judgement.quorum import unit_of

from hive_scheduler.domain.jobfile import JobSpec, Step
from hive_scheduler.domain.judging import Judging
from hive_scheduler.domain.needs import base_need, judge_need, plain_need, where
from hive_scheduler.domain.placement import Device, Need, never_reason, place_reason

if TYPE_CHECKING:
    from hive_scheduler.domain.job import JobState

Agents = Mapping[str, AgentRef]

JUDGE_WORDS: Final[dict[JudgeKind, str]] = {
    "critic": "verify.critic.agent",
    "test": "verify.test.agent",
    "vector": "verify.quorum.equal.embedding.agent",
    "pairs": "verify.quorum.equal.critic.agent",
    "senior": "verify.senior.agent",
}


def path_of(step: Step) -> str:
    """Return where a step stands in the job file."""
    return step.input.path.removesuffix(".input")


def check_places(spec: JobSpec, agents: Agents, owner: str, pin: str, devices: Collection[Device]) -> None:
    """Refuse a job of which nothing could ever do a part.

    Args:
        agents: of the job, by `name@version`.
        owner: whose job it is.
        pin: of the job, narrowed by that of the key.
        devices: all that are known.

    Raises:
        InvalidArgument: with the path in the job file, how many machines there are and how many are needed.
    """
    for step in spec.steps:
        if where(step.place) is not None:
            _check_place(step, devices)
        if step.judging is not None and step.judging.rule.distinct != "none":
            _check_distinct(step, step.judging, agents, owner, pin, devices)


def needs_of_children(job: "JobState", step: Step, agents: Iterable[str]) -> dict[str, Need]:
    """Return what tasks of these agents ask of a machine that one of a step forks, by agent.

    It is what a submit would look for: where the step says nothing of machines, its children wait for one.
    """
    if where(step.place) is None and step.judging is None:
        return {}
    known = (agent for agent in dict.fromkeys(agents) if agent in job.agents)
    return {agent: plain_need(job.agents[agent], step, job.owner, job.pin) for agent in known}


def _check_place(step: Step, devices: Collection[Device]) -> None:
    place, path = step.place, f"{path_of(step)}.place"
    here = [device for device in devices if not device.revoked and not device.killed]
    known = {device.name for device in here} | {device.executor for device in here}
    for index, name in enumerate(place.executors):
        if name not in known:
            close = nearest(name, known)
            expected = f"`{close}`" if close else "the name or id of an executor (hive executor list)"
            refuse("", f"{path}.executors[{index}]", f"there is no executor `{name}`", expected)
    if place.tier is not None and all(device.capabilities.tier != place.tier for device in here):
        tiers = sorted({device.capabilities.tier for device in here})
        found = f"a tier that one is of: {', '.join(tiers)}; hive up --tier {place.tier} sets it on a machine"
        refuse("", f"{path}.tier", f"no executor is of tier `{place.tier}`", found)
    for name, value in place.labels.items():
        values = sorted({device.capabilities.labels[name] for device in here if name in device.capabilities.labels})
        if value not in values:
            found = f"one of {', '.join(values)}" if values else f"a label that one has (hive up --label {name}=…)"
            refuse("", f"{path}.labels.{name}", f"no executor has the label {name}={value}", found)
    wanted = where(place)
    if wanted is not None and all(place_reason(device, wanted) is not None for device in here):
        refuse("", path, "no executor is all of this at once", "less, or a machine that is (hive executor list)")


# --- as many machines as have to be distinct ----------------------------------------------------------------


def _check_distinct(
    step: Step, words: Judging, agents: Agents, owner: str, pin: str, devices: Collection[Device]
) -> None:
    rule, path = words.rule, path_of(step)
    need = base_need(agents[step.agent], step, owner, pin)
    makers = _units(rule.distinct, need, devices)
    if len(makers) < rule.of:
        by_quorum = rule.k > 1 or rule.on_none != "fail"
        where_said = f"{path}.verify.quorum.of" if by_quorum else f"{path}.speculate.distinct"
        problem = f"{rule.of} results of {step.agent} are asked for"
        _refuse(where_said, problem, rule.of, makers, rule.distinct, need, devices)
    for kind, agent in words.judges.items():
        if agent:
            judge = judge_need(agents[agent], step, owner, senior=kind == "senior")
            judges = _units(rule.distinct, judge, devices)
            # At worst every result that it is shown comes from a machine on which it could run.
            taken = min({"pairs": 2, "senior": rule.of}.get(kind, 1), len(makers & judges))
            if len(judges) <= taken:
                problem = f"{agent} must not run where what it judges of {step.agent} came from"
                _refuse(f"{path}.{JUDGE_WORDS[kind]}", problem, taken + 1, judges, rule.distinct, judge, devices)


def _units(distinct: Distinct, need: Need, devices: Collection[Device]) -> set[str]:
    """Return the executors, devices or owners that could take a task, whoever else has one."""
    return {
        unit_of(distinct, Producer(0, device.executor, device.capabilities.device, device.owner))
        for device in devices
        if never_reason(device, need) is None
    }


def _refuse(
    path: str,
    problem: str,
    needed: int,
    found: Collection[str],
    distinct: Distinct,
    need: Need,
    devices: Collection[Device],
) -> NoReturn:
    out = Counter(reason for device in devices if (reason := never_reason(device, need)) is not None)
    why = ", ".join(f"{count} {reason}" for reason, count in sorted(out.items()))
    among = f" (of {len(devices)} executors, out of the question: {why})" if why else ""
    units = f"{distinct}s" if needed > 1 else distinct
    problem += f": that needs {needed} distinct {units}, and there {'is' if len(found) == 1 else 'are'} "
    refuse(
        "",
        path,
        f"{problem}{len(found)}{among}",
        "more of them (`hive executor token` lets a machine join), or `speculate: {distinct: none}`",
    )
