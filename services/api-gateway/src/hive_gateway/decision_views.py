"""What REST answers about decisions that were checked again."""

from hive_proto.audit.v1 import audit_pb2

from hive_gateway.views import View


class DecisionCheck(View, frozen=True, kw_only=True):
    """A decision over a judged task: its rule applied again, and the record held against the log.

    `result` is same, differs or not_checkable; `reasons` say what differs, or what does not exist any more.
    """

    task_id: str
    job_id: str
    step: str
    position: int
    outcome: str
    result: str
    reasons: tuple[str, ...]


class DecisionChecks(View, frozen=True, kw_only=True):
    """Decisions in order of their positions; `next` is for `after` where there are more."""

    checks: tuple[DecisionCheck, ...]
    next: int | None


def decision_checks(message: audit_pb2.DecisionsResponse) -> DecisionChecks:
    """Return the view of a page of checks."""
    return DecisionChecks(
        checks=tuple(
            DecisionCheck(
                task_id=one.task_id,
                job_id=one.job_id,
                step=one.step,
                position=one.position,
                outcome=one.outcome,
                result=one.result,
                reasons=tuple(one.reasons),
            )
            for one in message.checks
        ),
        next=message.next_after or None,
    )
