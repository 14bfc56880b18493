"""Approvals: executors that wait for a person's decision, and the people who decide.

What stands in the log decides; here is who waits for it. An executor asks again and again, so that an answer which
is lost, or a leader that is, costs nothing but the asking.
"""

import asyncio
from collections.abc import Callable, Iterator
from typing import Final

from hive_common.contracts.events import ApprovalRequested
from hive_common.contracts.limits import APPROVAL_MS, APPROVALS_OPEN_PER_JOB_MAX, APPROVALS_PER_TASK_MAX
from hive_common.contracts.messages import ApproveReply, ApproveRequest
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument, NotFound
from hive_common.permissions import denied
from hive_common.permissions.actions import Action, read_action
from hive_common.permissions.tokens import Claims, Verifier

from hive_scheduler.dispatch import Dispatcher, refused
from hive_scheduler.domain import approval as approvals
from hive_scheduler.domain.approval import VERDICTS, ApprovalState, approval_id
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.task import LIVE, TaskState
from hive_scheduler.engine import Engine
from hive_scheduler.permits import Permits

MESSAGE_VERSION: Final = 1
WAIT_S: Final = 5.0
"""An executor that asks is answered after this time at the latest, and asks again."""
REASON_CHARACTERS_MAX: Final = 500


class Approvals:
    """Takes what executors ask (`hive.exec.<id>.call.approve`), and what people decide.

    Args:
        engine: decides.
        dispatcher: knows which attempts are live, and counts their time.
        permits: what attempts may do, and their tokens.
        verifier: of capability tokens; None where there are none, so that nobody has anything to ask.
        is_revoked: says whether an executor is out.
        valid_ms: how long a person may take, and how long an approval holds.
    """

    def __init__(
        self,
        engine: Engine,
        dispatcher: Dispatcher,
        permits: Permits,
        verifier: Verifier | None,
        is_revoked: Callable[[str], bool],
        valid_ms: int = APPROVAL_MS,
    ) -> None:
        self._engine = engine
        self._dispatcher = dispatcher
        self._permits = permits
        self._verifier = verifier
        self._is_revoked = is_revoked
        self._valid_us = valid_ms * 1_000
        self._decided: dict[str, asyncio.Event] = {}

    def take_over(self) -> None:
        """Let what an earlier leader left run out in time."""
        for job in self._engine.jobs.values():
            for approval in job.approvals.values():
                if approval.status == "pending":
                    self._expire_in_time(job, approval)

    # --- executors ---

    async def ask(self, executor: str, request: ApproveRequest) -> ApproveReply:
        """Answer an attempt that wants to do something: at once where it is decided, else after a while.

        Raises:
            PermissionDenied: the token is no good, the permission was revoked, or too much is asked.
            FailedPrecondition: the attempt is not live any more.
            InvalidArgument: what it wants to do is not said as it has to be.
            Unavailable: not committed; the executor asks again.
        """
        if request.v != MESSAGE_VERSION:
            raise InvalidArgument(f"v: got {request.v}; expected {MESSAGE_VERSION}", path="v")
        if self._is_revoked(executor):
            raise refused(executor)
        if self._verifier is None:
            raise FailedPrecondition("this scheduler has no key to check capability tokens with")
        # It may have expired while it waited; whether the attempt is live is known here better.
        claims = self._verifier.verify(request.token, executor=executor, now_us=0)
        action = read_action(request.action)
        job, task = self._live(executor, claims)
        self._check(job, task, action)
        key = (executor, task.id, claims.attempt)
        approval = job.approvals.get(approval_id(job.id, task.id, action.hash))
        if approval is None:
            approval = self._request(job, task, claims.attempt, action)
        await self._engine.committer.settled()
        if approval.status == "pending":
            self._dispatcher.waits(*key)
            await self._wait(approval)
            job, task = self._live(executor, claims)
            self._dispatcher.waits(*key)
        status = approval.status
        # A decision counts once it is committed.
        await self._engine.committer.settled()
        if status != "approved":
            return ApproveReply(status=status, id=approval.id, reason=approval.reason)
        return self._approved(executor, job, task, claims.attempt, approval)

    def _live(self, executor: str, claims: Claims) -> tuple[JobState, TaskState]:
        found = self._engine.find_task(claims.task)
        if found is not None:
            job, task = found
            attempt = task.attempts.get(claims.attempt)
            closing = job.end is not None or job.closing(self._engine.now_us()) is not None
            if not closing and attempt is not None and attempt.executor == executor and attempt.status in LIVE:
                return job, task
        raise FailedPrecondition(f"attempt {claims.attempt} of task {claims.task} has ended")

    def _check(self, job: JobState, task: TaskState, action: Action) -> None:
        if action.agent != task.agent:
            raise InvalidArgument(f"action: is another agent's; expected {task.agent}", path="action")
        if action.permission not in self._permits.of_task(job, task).asks:
            raise denied(action.permission, "is not granted with a question at each use (`--ask`)")

    def _request(self, job: JobState, task: TaskState, attempt: int, action: Action) -> ApprovalState:
        pending = [one for one in job.approvals.values() if one.status == "pending"]
        of_task = sum(one.task == task.id for one in job.approvals.values())
        if of_task >= APPROVALS_PER_TASK_MAX or len(pending) >= APPROVALS_OPEN_PER_JOB_MAX:
            raise denied(
                action.permission,
                f"is granted with a question at each use, and of these one task may ask {APPROVALS_PER_TASK_MAX}, "
                f"and one job have {APPROVALS_OPEN_PER_JOB_MAX} open",
            )
        new = approval_id(job.id, task.id, action.hash)
        event = ApprovalRequested(
            job=job.id,
            task=task.id,
            attempt=attempt,
            agent=task.agent,
            permission=action.permission,
            action=action.text,
            hash=action.hash,
            expires_us=self._engine.now_us() + self._valid_us,
        )
        self._engine.apply_approval(job, new, [event])
        approval = job.approvals[new]
        self._expire_in_time(job, approval)
        return approval

    def _approved(
        self, executor: str, job: JobState, task: TaskState, attempt: int, approval: ApprovalState
    ) -> ApproveReply:
        now_us = self._engine.now_us()
        if approval.until_us <= now_us:
            return ApproveReply(status="expired", id=approval.id, reason="it was approved too long ago")
        approved = tuple(
            one.hash
            for one in job.approvals.values()
            if one.task == task.id and one.status == "approved" and one.until_us > now_us
        )
        token = self._permits.token(executor, job, task, attempt, self._permits.of_task(job, task), approved)
        return ApproveReply(status="approved", id=approval.id, token=token)

    async def _wait(self, approval: ApprovalState) -> None:
        decided = self._decided.setdefault(approval.id, asyncio.Event())
        try:
            async with asyncio.timeout(WAIT_S):
                await decided.wait()
        except TimeoutError:
            if approval.status != "pending":
                # It ended with its task.
                self._wake(approval.id)

    def _wake(self, approval: str) -> None:
        decided = self._decided.pop(approval, None)
        if decided is not None:
            decided.set()

    # --- people ---

    def all(self, job_id: str = "") -> Iterator[ApprovalState]:
        """Yield the approvals of open jobs, or of one job that is open or has ended a short while ago."""
        if job_id:
            job = self._engine.find_job(job_id)
            yield from () if job is None else job.approvals.values()
            return
        for job in self._engine.jobs.values():
            yield from job.approvals.values()

    def find(self, approval: str) -> tuple[JobState, ApprovalState]:
        """Return an approval and its job.

        Raises:
            NotFound: there is none in an open job, nor in one that has ended a short while ago.
        """
        for jobs in (self._engine.jobs, self._engine.ended):
            for job in jobs.values():
                if job.approvals and (found := job.approvals.get(approval)) is not None:
                    return job, found
        raise NotFound(f"there is no approval {approval[:80]} in a job that is open", approval=approval[:80])

    async def decide(self, approval: str, verdict: str, hash_: str, reason: str, by: str) -> ApprovalState:
        """Decide, and return once that is committed. The same decision twice is one.

        Args:
            verdict: `approved` or `denied`.
            hash_: of the action that the person saw.
            by: pseudonym of who decides.

        Raises:
            NotFound: as `find`.
            Conflict: the action is another one, or it was decided otherwise before.
            FailedPrecondition: it has expired.
            InvalidArgument: verdict or reason.
        """
        if verdict not in VERDICTS:
            raise InvalidArgument(f"verdict: got {verdict[:40]!r}; expected approved or denied", path="verdict")
        if len(reason) > REASON_CHARACTERS_MAX or not reason.isprintable():
            raise InvalidArgument(
                f"reason: expected {REASON_CHARACTERS_MAX} printable characters at most", path="reason"
            )
        job, found = self.find(approval)
        now_us = self._engine.now_us()
        decided = approvals.decide(found, verdict, hash_, by, reason, now_us, self._valid_us)
        if decided:
            self._engine.apply_approval(job, approval, decided, by, lambda _: self._wake(approval))
        await self._engine.committer.settled()
        return found

    # --- time ---

    def _expire_in_time(self, job: JobState, approval: ApprovalState) -> None:
        job_id, approval_id_ = job.id, approval.id

        def expire() -> None:
            job = self._engine.jobs.get(job_id)
            expired = [] if job is None else approvals.expire(job.approvals[approval_id_], approvals.TIMED_OUT)
            if job is None:
                self._wake(approval_id_)
            else:
                self._engine.apply_approval(job, approval_id_, expired, effect=lambda _: self._wake(approval_id_))

        self._engine.at(approval.expires_us, expire)
