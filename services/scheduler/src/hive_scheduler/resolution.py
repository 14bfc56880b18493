"""Which agents a job uses, decided at submit: those of its file and all that they may fork, each in one version."""

from collections.abc import Iterator
from typing import NamedTuple

import msgspec
from hive_common.artifacts.documents import nearest
from hive_common.artifacts.versions import sort_key
from hive_common.contracts.events import AgentRef
from hive_common.contracts.limits import JOB_AGENTS_MAX
from hive_common.contracts.permissions import Permissions
from hive_common.control.kill_log import KillLog
from hive_common.inference.calls import narrowest
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from hive_common.permissions import agent_covers, covers, named, only, reading

from hive_scheduler.catalogue import Catalogue
from hive_scheduler.domain.feasibility import JUDGE_WORDS, path_of
from hive_scheduler.domain.jobfile import JobSpec, Step
from hive_scheduler.permits import Permits

Agents = dict[str, AgentRef]


class _Parent(NamedTuple):
    """An agent whose children are to be looked at. `path`: where it comes from; `depth`: how deep it may fork."""

    reference: str
    path: str
    depth: int


class Resolution:
    """Finds the agents of new jobs.

    Args:
        catalogue: knows agents.
        kills: what is stopped.
        permits: what agents may do.
    """

    def __init__(self, catalogue: Catalogue, kills: KillLog, permits: Permits) -> None:
        self._catalogue = catalogue
        self._kills = kills
        self._permits = permits

    async def agents_of(self, spec: JobSpec, pin: str) -> Agents:
        """Return the agents of a new job by `name@version`, with what each may do.

        Of those that may fork, `fork.agents` names one version each: the one in the job file where that names the
        agent, else the newest that is not yanked.

        Raises:
            InvalidArgument: one of them does not exist; data of the job may go to no place where its models are.
            FailedPrecondition: it was yanked, or is stopped.
            PermissionDenied: it asks for what is not granted, nobody trusted has signed it, or it may be forked by
                an agent that may do less. Says what would help.
            Unavailable: the log cannot be read.
        """
        if spec.agents - self._catalogue.agents.keys():
            await self._catalogue.catch_up()
        named_by: dict[str, str] = {}
        for step in spec.steps:
            for reference, path in named_agents(step):
                named_by.setdefault(reference, path)
        found: Agents = {}
        for reference, path in named_by.items():
            if reference not in self._catalogue.agents:
                close = nearest(reference, self._catalogue.agents)
                hint = f"; did you mean {close}?" if close else ""
                raise InvalidArgument(
                    f"{path}: there is no agent {reference}{hint}", path=path, expected="a published name@version"
                )
            found[reference] = self._catalogue.agents[reference]
        for reference, path in named_by.items():
            await self._require_usable(reference, path, pin)
        agents = await self._permits.granted(found)
        for step in spec.steps:
            _require_reads(step, agents[step.agent])
        doers = {step.agent for step in spec.steps}
        parents = [
            _Parent(reference, named_by[reference], agent.fork.depth)
            for reference, agent in agents.items()
            if agent.fork is not None and reference in doers  # judges do not fork
        ]
        if parents:
            await self._add_forked(agents, parents, spec, pin)
        return agents

    async def _add_forked(self, agents: Agents, parents: list[_Parent], spec: JobSpec, pin: str) -> None:
        """Add what may be forked, and what that may fork, as deep as it goes. Circles end where depths do."""
        deepest: dict[str, int] = {}
        while parents:
            parent = parents.pop()
            if parent.depth <= deepest.get(parent.reference, 0):
                continue
            if parent.reference not in deepest:
                await self._pin(agents, parent, spec)
            deepest[parent.reference] = parent.depth
            forker = agents[parent.reference]
            assert forker.fork is not None
            for reference in forker.fork.agents:
                path = f"{parent.path} → {reference}"
                if reference not in agents:
                    await self._require_usable(reference, path, pin)
                    agents |= await self._permits.granted({reference: self._catalogue.agents[reference]})
                    if len(agents) > JOB_AGENTS_MAX:
                        raise InvalidArgument(
                            f"{parent.path}: the job would have more than {JOB_AGENTS_MAX} agents with all that "
                            "may be forked",
                            path=parent.path,
                        )
                child = agents[reference]
                if child.fork is not None and parent.depth > 1:
                    below = _Parent(reference, path, min(parent.depth - 1, child.fork.depth))
                    parents.append(below)
                    if reference not in deepest:
                        await self._pin(agents, below, spec)
                    child = agents[reference]
                _require_within(parent, forker, child)

    async def _pin(self, agents: Agents, parent: _Parent, spec: JobSpec) -> None:
        """Have an agent's permission to fork name versions."""
        agent = agents[parent.reference]
        assert agent.fork is not None
        pinned = [await self._version_of(name, parent, spec) for name in agent.fork.agents]
        fork = msgspec.structs.replace(agent.fork, agents=tuple(dict.fromkeys(pinned)))
        agents[parent.reference] = msgspec.structs.replace(agent, fork=fork)

    async def _version_of(self, name: str, parent: _Parent, spec: JobSpec) -> str:
        found = [reference for reference in spec.agents if agent_covers(name, reference)]
        found = found or self._catalogue.versions(name)
        if not found:
            await self._catalogue.catch_up()
            found = self._catalogue.versions(name)
        if found:
            return max(found, key=lambda reference: sort_key(reference.partition("@")[2]))
        close = nearest(name, {known.partition("@")[0] for known in self._catalogue.agents})
        hint = f"; did you mean {close}?" if close else ""
        raise InvalidArgument(
            f"{parent.path}: {parent.reference} may fork {name}, and there is no such agent{hint}; "
            "expected one that is published (hive agent push)",
            path=parent.path,
            expected="published agents in `permissions.fork.agents`",
        )

    async def _require_usable(self, reference: str, path: str, pin: str) -> None:
        """Refuse a version that was yanked, that nobody signed whose key is trusted, or that is stopped."""
        agent = self._catalogue.agents[reference]
        if reference in self._catalogue.yanked:
            raise FailedPrecondition(
                f"{path}: {reference} was yanked: {self._catalogue.yanked[reference]}; "
                f"expected another version of it (hive agent list {agent.name})",
                path=path,
            )
        try:
            self._catalogue.signers.require(agent)
        except PermissionDenied:
            # A key that was trusted a moment ago may not be here yet.
            await self._catalogue.catch_up()
            self._catalogue.signers.require(agent)
        _check_pins(pin, reference, agent)
        entry = self._kills.verifier.stopped.agent(agent.name, agent.version)
        if entry is not None:
            raise self._kills.refusal(entry)


def agent_path(step: Step) -> str:
    """Return where a job file names the agent of a step."""
    return f"{path_of(step)}.agent"


def named_agents(step: Step) -> Iterator[tuple[str, str]]:
    """Yield every agent that a step names, its own first, and where in the job file."""
    path, join = path_of(step), step.join
    yield step.agent, agent_path(step)
    if step.judging is not None:
        for kind, agent in step.judging.judges.items():
            if agent:
                yield agent, f"{path}.{JUDGE_WORDS[kind]}"
    if join.integrator:
        yield join.integrator, f"{path}.join.integrator.agent"


def _require_reads(step: Step, agent: AgentRef) -> None:
    """Refuse an agent that would be done several times, and asks for nothing but requests that change something."""
    if step.judging is None or not step.judging.replicated or agent.http is None or reading(agent.http) is not None:
        return
    path = agent_path(step)
    raise InvalidArgument(
        f"{path}: {step.agent} asks for {', '.join(agent.http.methods)} of `http`, and its task is replicated, in "
        "which only GET and HEAD are allowed; expected one that reads, or a task with one attempt",
        path=path,
        expected="an agent that asks for GET or HEAD",
    )


def _require_within(parent: _Parent, forker: AgentRef, child: AgentRef) -> None:
    """Refuse a child that asks for more than its parent has: it would run with less than it was written for.

    How many levels and tasks it may fork itself is no reason: those end where its parent's do.
    """
    lacking = [name for name in named(_alone(child)) if not covers(_alone(forker), only(_alone(child), name))]
    if child.fork is not None and parent.depth > 1:
        assert forker.fork is not None
        allowed = forker.fork.agents
        if any(not any(agent_covers(one, other) for one in allowed) for other in child.fork.agents):
            lacking.append("fork")
    if not lacking:
        return
    names, reference = ", ".join(f"`{name}`" for name in lacking), f"{child.name}@{child.version}"
    remedy = f"hive agent grant {forker.name} {' '.join(lacking)}"
    raise PermissionDenied(
        f"{parent.path}: {parent.reference} may fork {reference}, which asks for more of {names} than "
        f"{parent.reference} has itself. Let {forker.name} ask for it too ("
        + ", ".join(f"`permissions.{name}`" for name in lacking)
        + f"), then: {remedy}",
        path=parent.path,
        agent=parent.reference,
        permissions=lacking,
        remedy=remedy,
    )


def _alone(agent: AgentRef) -> Permissions:
    """Return what an agent may do beside forking. A child asks a person where its parent does, whatever it says."""
    return msgspec.structs.replace(agent.permissions, fork=None, asks=())


def _check_pins(pin: str, reference: str, agent: AgentRef) -> None:
    """Refuse a job whose models may be nowhere: each attempt would end with `permission_denied`."""
    if agent.model is None:
        return
    try:
        narrowest(pin, agent.model.pin)
    except PermissionDenied as error:
        raise InvalidArgument(
            f"models.pin: {error.message}, and `{agent.model.pin}` stands in the manifest of {reference}",
            path="models.pin",
        ) from error
