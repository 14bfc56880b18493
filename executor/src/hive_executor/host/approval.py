"""Permissions with a question at each use: the attempt waits until a person decides, and its time stands still."""

import asyncio
from collections.abc import Callable
from typing import Final, Protocol

from hive_common.contracts.messages import ApproveReply, ApproveRequest, call_subject
from hive_common.kernel.errors import HiveError
from hive_common.permissions import denied
from hive_common.permissions.actions import Action

from hive_executor.link import Backoff, Link
from hive_executor.sandbox.limit import TimeLimit

SUBJECT: Final = "approve"
ASK_S: Final = 15.0
"""The scheduler answers well within this, if only that nobody has decided."""


class Approver(Protocol):
    """Whoever can get a person to decide."""

    async def ask(self, request: ApproveRequest) -> ApproveReply:
        """Return what was decided, however long that takes.

        Raises:
            HiveError: it cannot be asked, now or ever.
        """
        ...


class Approvals:
    """What people approve for one attempt.

    Args:
        token: of the attempt.
        asks: permissions for each use of which somebody is asked.
        agent: `name@version` of what runs.
        approver: gets them to decide; without one, nobody does.
        limit: counts the attempt's time.

    Attributes:
        token: the newest of the attempt; it says what was approved.
        limit: as given.
    """

    def __init__(
        self,
        token: str = "",
        asks: tuple[str, ...] = (),
        agent: str = "",
        approver: Approver | None = None,
        limit: TimeLimit | None = None,
    ) -> None:
        self.token = token
        self._agent = agent
        self.limit = limit or TimeLimit()
        self._asks = frozenset(asks)
        self._approver = approver
        self._approved: set[str] = set()

    def asks(self, permission: str) -> bool:
        """Say whether somebody is asked at each use of a permission."""
        return permission in self._asks

    async def need(self, permission: str, action_of: Callable[[str], Action]) -> None:
        """Return once a person has approved of an action, at once where nobody has to or somebody did.

        Args:
            permission: that the action takes.
            action_of: returns the action of an agent; not called where nobody is asked.

        Raises:
            PermissionDenied: it was denied, nobody decided in time, or it may not be asked.
            HiveError: it cannot be asked.
        """
        if not self.asks(permission):
            return
        action = action_of(self._agent)
        if action.hash in self._approved:
            return
        if self._approver is None:
            raise denied(permission, "is granted with a question at each use, and nobody can be asked here")
        with self.limit.standing():
            reply = await self._approver.ask(ApproveRequest(token=self.token, action=action.text))
        match reply.status:
            case "approved":
                self.token = reply.token
                self._approved.add(action.hash)
            case "denied":
                why = f": {reply.reason}" if reply.reason else ""
                raise denied(permission, f"was denied for this use by a person (approval {reply.id}){why}")
            case _:
                raise denied(
                    permission,
                    f"was not approved for this use in time (approval {reply.id}): {reply.reason}",
                )


class SchedulerApprover:
    """An `Approver` that asks the scheduler again and again, whatever is away meanwhile.

    Args:
        link: to the control plane.
    """

    def __init__(self, link: Link) -> None:
        self._link = link
        self._subject = call_subject(link.executor_id, SUBJECT)

    async def ask(self, request: ApproveRequest) -> ApproveReply:
        """Ask until it is decided; see `Approver`. It is cancelled with its attempt.

        Raises:
            PermissionDenied: it may not be asked.
            HiveError: the attempt has ended, or the request is no good.
        """
        backoff = Backoff()
        while True:
            try:
                reply = await self._link.request(self._subject, request, ApproveReply, ASK_S)
                if reply.error is not None:
                    raise reply.error.raised()
                if reply.status != "pending":
                    return reply
                backoff.reset()
            except HiveError as error:
                if not error.retryable:
                    raise
                await asyncio.sleep(backoff.next_s())
