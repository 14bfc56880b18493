"""What was decided over a task, as the log has it, told so that people understand it."""

from typing import Any, Final

import msgspec
from hive_common.contracts import events
from hive_common.contracts.events import TaskCancelled, TaskCreated, TaskDecided, TaskFailed, TaskSucceeded
from hive_common.contracts.judgement import Decision, Producer
from hive_common.eventlog.log import LogReader, Stored
from hive_common.judgement.quorum import Votes, sift
from hive_common.judgement.record import self_judged
from hive_common.judgement.words import rule_in_words
from hive_common.kernel.errors import FailedPrecondition, NotFound
from hive_common.kernel.ids import is_id

from hive_scheduler.domain.placement import Fleet

_TYPES: Final = ("TaskCreated", "TaskDecided", "TaskSucceeded", "TaskFailed", "TaskCancelled")
Told = dict[str, Any]


class DecisionRecord(msgspec.Struct, frozen=True):
    """A task and what was decided over it, if it was.

    Attributes:
        decided: None before there is a decision, and where there will be none.
        end: the task's terminal event; None while it has not ended.
    """

    task: str
    created: TaskCreated
    decided: TaskDecided | None
    end: events.Event | None
    position: int
    ts_us: int


async def read_decision(reader: LogReader, task_id: str) -> DecisionRecord:
    """Return what the log says of the decision over a task.

    Raises:
        NotFound: there is no such task.
        FailedPrecondition: what was decided was erased.
    """
    stored = await reader.read(0, len(_TYPES), types=_TYPES, streams=[task_id]) if is_id(task_id) else []
    found = {one.type: one for one in stored}
    created = _event(found.get("TaskCreated"))
    if not isinstance(created, TaskCreated):
        raise NotFound(f"there is no task {task_id[:80]}", task=task_id[:80])
    at = found.get("TaskDecided")
    decided = _event(at)
    end = next((event for one in stored if isinstance(event := _event(one), _ENDS)), None)
    return DecisionRecord(
        task_id,
        created,
        decided if isinstance(decided, TaskDecided) else None,
        end,
        0 if at is None else at.position,
        0 if at is None else at.ts_us,
    )


def told(record: DecisionRecord, fleet: Fleet) -> Told:
    """Return a decision with its rule in words, the names of its executors, and who voted for what.

    Raises:
        FailedPrecondition: the results of the task are not judged, or nothing is decided, with the reason.
    """
    if record.decided is None:
        raise _undecided(record)
    decision = record.decided.decision
    created = record.created
    return {
        "task": record.task,
        "job": created.job,
        "step": created.step,
        "index": created.index,
        "position": record.position,
        "ts_us": record.ts_us,
        "rule": msgspec.to_builtins(decision.rule),
        "rule_words": rule_in_words(decision.rule),
        "outcome": decision.outcome,
        "reason": decision.reason,
        "winner": decision.winner,
        "votes": list(decision.votes),
        "trust": record.decided.trust,
        "spent": decision.spent,
        "coming": decision.coming,
        "gone": decision.gone,
        "candidates": _candidates(decision, fleet),
        "running": [_place(one, fleet) for one in decision.running],
        "pairs": msgspec.to_builtins(decision.pairs),
        "judges": [
            {
                "kind": one.kind,
                "agent": one.agent,
                "task": one.task,
                "judged": list(one.judged),
                "by": _place(one.by, fleet),
            }
            for one in decision.judges
        ],
        "self_judged": [{"agent": agent, "attempt": attempt} for agent, attempt in self_judged(decision)],
    }


_ENDS: Final = (TaskSucceeded, TaskFailed, TaskCancelled)


def _candidates(decision: Decision, fleet: Fleet) -> list[Told]:
    sifted = sift(decision.rule, decision.candidates)
    valid = {one.attempt for one in sifted.valid}
    votes = Votes(decision.rule, sifted.valid, decision.pairs)
    return [
        {
            **_place(one, fleet),
            "digest": one.digest,
            "score": one.score,
            "passed": one.passed,
            "valid": one.attempt in valid,
            "why_not": sifted.out.get(one.attempt, "" if one.attempt in valid else "not judged"),
            "votes": list(votes.voters(one.attempt)) if one.attempt in valid else [],
        }
        for one in decision.candidates
    ]


def _place(one: Producer, fleet: Fleet) -> Told:
    device = fleet.get(one.executor)
    return {
        "attempt": one.attempt,
        "executor": one.executor,
        "name": "" if device is None else device.name,
        "device": one.device,
        "owner": one.owner,
    }


def _event(stored: Stored | None) -> events.Event | None:
    if stored is None:
        return None
    if stored.payload is None:
        raise FailedPrecondition(f"the data of {stored.type} at position {stored.position} was erased")
    return events.decode(stored.type, stored.schema, stored.payload)


def _undecided(record: DecisionRecord) -> FailedPrecondition:
    task, created, end = record.task, record.created, record.end
    if created.judging is not None:
        of = f"; it judges results of {created.judging.task}" if created.judging.task else ""
        why = f"is a judge ({created.judging.kind}), and nobody decides over its own result{of}"
    elif not created.replicas:
        why = "was not judged: its job file has no `speculate` or `verify`, and its first success is its result"
    elif end is None:
        why = "is judged, and nothing is decided yet; `hive job watch` shows how far it is"
    elif isinstance(end, TaskFailed):
        why = f"failed before anything could be decided: {end.code}: {end.message}"
    elif isinstance(end, TaskCancelled):
        why = f"ended before anything was decided: it was cancelled ({end.reason})"
    else:
        why = "ended without a decision in the log"
    return FailedPrecondition(f"the task {task} {why}", task=task, judged=bool(created.replicas))
