"""Whom to trust how far: records of executors, and how often what they give is checked.

Adaptive replication as BOINC does it: for each executor and agent the valid results in a row are counted; below
`TRUSTED_AFTER` each result is checked by a second executor, from there on with a probability of 1/n, but never less
than `CHECK_MIN`. One invalid result sets n to zero. Results that came late or never do not: a laptop that was shut
is no liar; they are counted for placement.

Two invalid results among the last `JUDGED_KEPT` that were judged of an executor, whatever the agent, put it into
quarantine, from where only a person takes it, who begins new records for it. One does not: memory flips bits; but
whatever the agent, everything is checked again until the executor is known anew.

Chance comes in as a number in [0, 1), one for each decision, never drawn here and never used twice.

Source: D. P. Anderson, BOINC: A Platform for Volunteer Computing, Journal of Grid Computing 18, 2020; there the
threshold is 10, and the probability 1/n has no lower bound. Quarantine and canaries are ours.
"""

from typing import Final, Literal

import msgspec

Ending = Literal["valid", "invalid", "late", "lost"]
Standing = Literal["new", "known", "quarantined"]
Access = Literal["", "quarantined", "new_executor"]

TRUSTED_AFTER: Final = 10
CHECK_MIN: Final = 0.02
"""Of one that was never wrong, every fiftieth result is checked still."""
JUDGED_KEPT: Final = 20
INVALID_MAX: Final = 1
CANARY_NEW: Final = 0.1
CANARY_KNOWN: Final = 0.01
"""How often a task with a known answer goes to a new executor, and to one that is known."""


class AgentRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an executor gave for one agent. `in_a_row`: valid results since the last invalid one."""

    in_a_row: int = 0
    valid: int = 0
    invalid: int = 0
    late: int = 0
    lost: int = 0


class ExecutorRecord(msgspec.Struct, frozen=True, omit_defaults=True):
    """What an executor gave in all.

    Attributes:
        judged: the last results of which it is known, oldest first: True is valid.
        quarantined: it gets nothing from anybody but its owner.
    """

    judged: tuple[bool, ...] = ()
    quarantined: bool = False


def evolve_agent(record: AgentRecord, ending: Ending) -> AgentRecord:
    """Return the record of an executor and agent after one more result.

    `valid` and `invalid` are only of results that somebody judged: by a quorum, a test, a person or a known answer.
    """
    in_a_row = 0 if ending == "invalid" else record.in_a_row + (ending == "valid")
    return msgspec.structs.replace(record, in_a_row=in_a_row, **{ending: getattr(record, ending) + 1})


def evolve_executor(record: ExecutorRecord, ending: Ending) -> ExecutorRecord:
    """Return the record of an executor after one more result, of whatever agent."""
    if ending not in ("valid", "invalid"):
        return record
    judged = (*record.judged, ending == "valid")[-JUDGED_KEPT:]
    return ExecutorRecord(
        judged=judged,
        quarantined=record.quarantined or judged.count(False) > INVALID_MAX,
    )


def standing(record: ExecutorRecord) -> Standing:
    """Say what an executor is: new until `TRUSTED_AFTER` results in a row were found valid, of whatever agents."""
    if record.quarantined:
        return "quarantined"
    last = record.judged[-TRUSTED_AFTER:]
    return "known" if len(last) == TRUSTED_AFTER and all(last) else "new"


def refused(record: ExecutorRecord, executor_owner: str, task_owner: str, low_trust: bool) -> Access:
    """Say why an executor may not have a task; empty where it may. For placement.

    Args:
        low_trust: the task may go to machines that nobody knows yet: its result is judged by others, and it holds
            nothing that its owner would not show them.
    """
    return refused_as(standing(record), executor_owner, task_owner, low_trust)


def refused_as(standing: Standing, executor_owner: str, task_owner: str, low_trust: bool) -> Access:
    """Say the same of an executor whose standing is known."""
    if executor_owner == task_owner:
        return ""
    match standing:
        case "quarantined":
            return "quarantined"
        case "new" if not low_trust:
            return "new_executor"
    return ""


def check_probability(record: AgentRecord) -> float:
    """Return how probably the next result is checked by another executor."""
    return 1.0 if record.in_a_row < TRUSTED_AFTER else max(1.0 / record.in_a_row, CHECK_MIN)


def is_checked(record: AgentRecord, executor: ExecutorRecord, chance: float) -> bool:
    """Decide whether a result is checked by another executor.

    The executor must not be able to tell: it is decided by a number that it does not see, and a second attempt
    looks like any other.
    """
    return standing(executor) != "known" or chance < check_probability(record)


def gets_canary(executor: ExecutorRecord, chance: float) -> bool:
    """Decide whether an executor is given a task with a known answer before its next real one.

    New ones get more of them. One in quarantine gets none: it has nothing to win by them. A canary looks like any
    other task of its agent, and its result is judged by the answer alone.
    """
    match standing(executor):
        case "new":
            return chance < CANARY_NEW
        case "known":
            return chance < CANARY_KNOWN
    return False
