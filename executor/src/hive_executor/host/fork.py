"""The permission `fork`: tasks for other agents. They go with the report that the attempt has succeeded."""

from typing import Final

import msgspec
from hive_common.contracts.events import Child
from hive_common.contracts.limits import FORK_STAGED_BYTES_MAX
from hive_common.contracts.permissions import ForkPermission, Permissions
from hive_common.kernel.errors import InvalidArgument, PayloadTooLarge
from hive_common.permissions import agent_covers, check_fork
from hive_common.permissions.actions import fork_action

from hive_executor.host.approval import Approvals

OPERATION: Final = "create"
_DEPTH: Final = 1
"""A token says how deep may be forked from its own task."""


class _Create(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    agent: str
    inputs: tuple[msgspec.Raw, ...]


class ForkAccess:
    """What one attempt forks.

    Args:
        permission: the agents, and how many tasks.
        approvals: of the attempt.
    """

    def __init__(self, permission: ForkPermission, approvals: Approvals | None = None) -> None:
        self._approvals = approvals or Approvals()
        self._permissions = Permissions(fork=permission)
        self._agents = permission.agents
        self._staged: list[Child] = []
        self._bytes = 0

    @property
    def staged(self) -> tuple[Child, ...]:
        """What was forked so far."""
        return tuple(self._staged)

    async def call(self, operation: str, request: bytes, left_ms: int) -> bytes:
        """Take the inputs of some tasks, all of them or none; see `Capability`.

        Raises:
            PermissionDenied: another agent, or more tasks than are granted.
            InvalidArgument: the request.
            PayloadTooLarge: all that this attempt forks.
        """
        if operation != OPERATION:
            raise InvalidArgument(f"fork.{operation} does not exist; expected {OPERATION}")
        try:
            asked = msgspec.json.decode(request, type=_Create)
            # Spaces between things are the guest's, and need not be kept.
            inputs = [msgspec.json.format(bytes(one), indent=-1) for one in asked.inputs]
        except (msgspec.DecodeError, RecursionError) as error:
            raise InvalidArgument(f"the request is not what this takes: {error}") from error
        agent = self._version_of(asked.agent)
        for made in range(len(self._staged), len(self._staged) + len(inputs)):
            check_fork(self._permissions, agent, made=made, depth=_DEPTH)
        total = self._bytes + sum(map(len, inputs))
        if total > FORK_STAGED_BYTES_MAX:
            raise PayloadTooLarge(
                f"the inputs of all that this attempt forks would have {total} bytes; expected "
                f"{FORK_STAGED_BYTES_MAX} at most: fork fewer, and have them fork the rest"
            )
        await self._approvals.need("fork", lambda own: fork_action(own, agent, inputs))
        self._bytes = total
        self._staged += [Child(agent, msgspec.Raw(one)) for one in inputs]
        return msgspec.json.encode({"children": len(self._staged)})

    def _version_of(self, name: str) -> str:
        """Return the `name@version` that a name without version stands for."""
        if "@" in name:
            return name
        found = [one for one in self._agents if agent_covers(name, one)]
        if len(found) > 1:
            raise InvalidArgument(f"agent: {name[:80]} stands for {' and '.join(found)}; expected one of them")
        return found[0] if found else name
