"""What guests may ask of the host, one file for each permission, and which of it an attempt was granted."""

from hive_common.contracts.messages import Assignment
from hive_common.inference.calls import Completer, narrowest

from hive_executor.host.model import ModelAccess
from hive_executor.sandbox import Capabilities

__all__ = ["ModelAccess", "granted"]


def granted(assignment: Assignment, completer: Completer) -> Capabilities:
    """Return what the guest of an attempt may ask for, and nothing else (law 6).

    Publishing an agent counts as granting what its manifest asks for, as long as there are no grants of their own.

    Raises:
        PermissionDenied: job and manifest pin data to places that exclude each other.
    """
    permission = assignment.agent.model
    if permission is None:
        return {}
    return {
        "model": ModelAccess(
            completer,
            permission,
            pin=narrowest(assignment.pin, permission.pin),
            counts_only=assignment.counts_only,
            job=assignment.job,
            task=assignment.task,
            attempt=assignment.attempt,
        )
    }
