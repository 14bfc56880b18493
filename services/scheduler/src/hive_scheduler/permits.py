"""What agents may do: decided at submit, looked at again at each assignment, and said in a capability token."""

from collections.abc import Mapping, Sequence
from typing import Final

import msgspec
from hive_common.contracts.budgets import JOB, TASK, SharedBudget, shared
from hive_common.contracts.events import AgentRef, Child
from hive_common.contracts.limits import CAPABILITY_TOKEN_CHARACTERS_MAX
from hive_common.contracts.permissions import NONE, Permissions
from hive_common.control.kill_log import KillLog
from hive_common.kernel.clock import Clock
from hive_common.kernel.errors import FailedPrecondition, PermissionDenied
from hive_common.permissions import check_fork, delegated, denied, named, only, reading
from hive_common.permissions.grants import effective
from hive_common.permissions.tokens import Claims, Minter

from hive_scheduler.catalogue import Catalogue
from hive_scheduler.domain.forks import all_approved, ancestors
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.task import TaskState

TOKEN_GRACE_MS: Final = 5 * 60_000
"""A token outlives the timeout of its attempt by this: before its guest starts, an attempt waits for its slot and
its module is compiled. An attempt that is over is refused by other means long before."""


class Permits:
    """Decides what agents may do.

    Args:
        catalogue: knows grants, and the keys of executors.
        clock: says whether a grant has expired.
        minter: makes tokens; without one, agents that ask for anything cannot be used.
        kills: what is stopped; a token names the newest order that was known when it was made.
    """

    def __init__(self, catalogue: Catalogue, clock: Clock, minter: Minter | None, kills: KillLog) -> None:
        self._catalogue = catalogue
        self._clock = clock
        self._minter = minter
        self._kills = kills

    async def granted(self, agents: Mapping[str, AgentRef]) -> dict[str, AgentRef]:
        """Return the agents of a new job with what each may do.

        Args:
            agents: by `name@version`, with what each asks for.

        Raises:
            PermissionDenied: one of them asks for what is not granted; says the command that would grant it.
            FailedPrecondition: this scheduler cannot make tokens.
            Unavailable: the log cannot be read.
        """
        found = dict(agents)
        asking = [(reference, agent) for reference, agent in agents.items() if not is_plain(agent)]
        if asking and self._minter is None:
            raise FailedPrecondition(
                f"{asking[0][0]} asks for permissions, and this scheduler has no key for capability tokens "
                "(`extra.token_key_file` of its configuration)"
            )
        if asking:
            # What was granted or taken back a moment ago may not be here yet.
            await self._catalogue.catch_up()
        for reference, agent in asking:
            found[reference] = with_permissions(agent, self._effective(agent))
        return found

    async def catch_up(self) -> None:
        """Take over what was decided of agents and executors a moment ago. Raises `Unavailable`."""
        await self._catalogue.catch_up()

    def permissions(self, agent: AgentRef) -> Permissions:
        """Return what an agent of a job may do now: what it was granted at submit and still is.

        Raises:
            PermissionDenied: something was revoked, or has expired, since.
        """
        return NONE if is_plain(agent) else self._effective(agent)

    def of_task(self, job: JobState, task: TaskState) -> Permissions:
        """Return what a task may do now: what its agent may, and all above it where it was forked.

        Judges do not fork.

        Raises:
            PermissionDenied: something was revoked, or has expired, since the job was submitted.
        """
        own = self.permissions(job.agents[task.agent])
        if own.http is not None and is_replicated(job, task):
            own = msgspec.structs.replace(own, http=reading(own.http))
        if task.judging is not None:
            own = only(own, *(name for name in named(own) if name != "fork"))
        if task.parent is None or own == NONE:
            return own
        return delegated(self.of_task(job, job.tasks[task.parent]), own)

    def check_forks(self, job: JobState, task: TaskState, wanted: Sequence[Child]) -> None:
        """Check that a task may have these children now, whatever its executor let it believe.

        Raises:
            PermissionDenied: it may not have all of them.
        """
        allowed = self.of_task(job, task)
        if "fork" in allowed.asks and not all_approved(task, wanted, job.approvals.values()):
            raise denied("fork", "is granted with a question at each use, and nobody approved of just this")
        for agent in dict.fromkeys(child.agent for child in wanted):
            check_fork(allowed, agent, made=len(wanted) - 1, depth=1)
            if agent not in job.agents:
                raise denied("fork", f"does not cover {agent}, which is none of the agents of this job")
        for above in (task, *ancestors(task, job.tasks)):
            fork = self.of_task(job, above).fork
            below = job.forks.below.get(above.id, 0) + len(wanted)
            if fork is None or below > fork.max:
                most = 0 if fork is None else fork.max
                raise denied("fork", f"is granted to {above.agent} for {most} tasks below it, not for {below}")
        total = job.task_total() + job.unexpanded() + len(wanted)
        if total > job.spec.fan_out:
            raise denied(
                "fork",
                f"ends where the job does: it would have {total} tasks or more, and limits.fan_out allows "
                f"{job.spec.fan_out}",
            )

    def token(
        self,
        executor: str,
        job: JobState,
        task: TaskState,
        attempt: int,
        permissions: Permissions,
        approved: tuple[str, ...] = (),
    ) -> str:
        """Return the token of an attempt; empty where it may do nothing.

        Args:
            approved: hashes of the actions that a person approved.

        Raises:
            PermissionDenied: it cannot be made.
        """
        if permissions == NONE:
            return ""
        key = self._catalogue.keys.get(executor)
        if self._minter is None or key is None:
            raise PermissionDenied(
                "no capability token can be made: "
                + ("this scheduler has no key for it" if key else f"executor {executor} is not enrolled"),
            )
        token = self._minter.mint(
            Claims(
                executor=executor,
                key=key,
                job=job.id,
                task=task.id,
                attempt=attempt,
                agent=task.agent,
                pin=job.pin,
                counts_only=job.counts_only,
                kill_epoch=self._kills.verifier.epoch,
                permissions=permissions,
                approved=approved,
                budgets=budgets_of(job, task),
                replicated=is_replicated(job, task),
                expires_us=self._clock.now_us() + (task.timeout_ms + TOKEN_GRACE_MS) * 1_000,
            )
        )
        if len(token) > CAPABILITY_TOKEN_CHARACTERS_MAX:
            raise PermissionDenied(
                f"the capability token would have {len(token)} characters, expected "
                f"{CAPABILITY_TOKEN_CHARACTERS_MAX} at most: the manifest lists too much"
            )
        return token

    def _effective(self, agent: AgentRef) -> Permissions:
        grants = self._catalogue.grants.get(agent.name, {})
        # A person who was to be asked when the job was submitted is asked, whatever was granted since.
        asked = msgspec.structs.replace(agent.permissions, asks=())
        found = effective(agent.name, agent.version, asked, grants, self._clock.now_us())
        asks = tuple(name for name in agent.asks if name not in found.asks)
        return msgspec.structs.replace(found, asks=(*found.asks, *asks)) if asks else found


def is_replicated(job: JobState, task: TaskState) -> bool:
    """Say whether several attempts of a task may run beside each other, so that what they do is done several times.

    What such a task forked is under its parent's permissions. A judge is one attempt.
    """
    judging = job.steps[task.step].step.judging
    return task.judged is not None and judging is not None and judging.replicated


def budgets_of(job: JobState, task: TaskState) -> tuple[SharedBudget, ...]:
    """Return what the model calls of a task share with others.

    All calls of a job share the job's budget. All attempts of a task, and all that it forked, share the task's, so
    that nobody gets more by forking; a judge's are on the account of the job alone.
    """
    found = []
    if job.spec.budget is not None:
        found.append(shared(f"{JOB}:{job.id}", job.spec.budget))
    budget = job.steps[task.step].step.budget
    if budget is not None and task.judging is None:
        *_, root = (task, *ancestors(task, job.tasks))
        found.append(shared(f"{TASK}:{root.id}", budget))
    return tuple(found)


def is_plain(agent: AgentRef) -> bool:
    """Say whether an agent may do nothing but compute; asked for every attempt, so it builds nothing."""
    return (
        agent.model is None
        and agent.http is None
        and agent.kv is None
        and agent.fork is None
        and agent.scratch_bytes == 0
    )


def with_permissions(agent: AgentRef, permissions: Permissions) -> AgentRef:
    """Return the same agent with other permissions."""
    return msgspec.structs.replace(
        agent,
        model=permissions.model,
        http=permissions.http,
        kv=permissions.kv,
        fork=permissions.fork,
        scratch_bytes=permissions.scratch_bytes,
        asks=permissions.asks,
    )
