"""A job with a judged task, as a scheduler writes it: decided is what the rule gives, unless a test says else."""

from collections.abc import Sequence
from typing import Any

import msgspec
from hive_common.contracts import events
from hive_common.contracts.events import (
    AgentRef,
    AttemptFailed,
    AttemptSucceeded,
    Event,
    JobSubmitted,
    Judging,
    TaskAssigned,
    TaskCreated,
    TaskDecided,
    TaskExtended,
    TaskFailed,
    TaskSucceeded,
)
from hive_common.contracts.judgement import Candidate, Decision, Judge, Pair, Producer
from hive_common.contracts.values import Value, digest_of, inline
from hive_common.eventlog.log import Append, LogWriter, NewEvent
from hive_common.judgement.equality import key_of
from hive_common.judgement.quorum import Decided, Escalate, Failed, Kept, judge
from hive_common.judgement.record import decision_of
from hive_common.kernel.ids import new_id
from hive_common.testing.fixtures import Database

SOLVER, CRITIC = "solver@1.0.0", "critic@1.0.0"
TASK = {"id": "answer", "agent": SOLVER, "input": {"n": 1}}


def quorum(**more: Any) -> dict[str, Any]:
    """Return a task of which two of three results have to agree."""
    words = {"k": 2, "of": 3, "on_none": "fail", **more}
    return {**TASK, "speculate": {"distinct": "executor"}, "verify": {"quorum": words}}


def producer(attempt: int) -> Producer:
    return Producer(attempt, f"executor-{attempt}", f"device-{attempt}", "owner-1")


def assigned(by: Producer, attempt: int | None = None) -> TaskAssigned:
    number = by.attempt if attempt is None else attempt
    return TaskAssigned(number, by.executor, "session", 1_000, device=by.device, owner=by.owner)


async def append(database: Database, job: str, streams: dict[str, Sequence[Event]], first: int = 1) -> None:
    """Append events of a job, stream by stream, from version `first` on."""
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        for stream, made in streams.items():
            new = (
                NewEvent(
                    stream,
                    version,
                    type(event).__name__,
                    events.SCHEMA,
                    events.encode(event),
                    ts_us=1,
                    actor="scheduler",
                    owner="owner",
                    correlation=job,
                )
                for version, event in enumerate(made, first)
            )
            await writer.append(Append(tuple(new)))


def submitted(document: dict[str, Any]) -> JobSubmitted:
    return JobSubmitted(
        "judged",
        msgspec.Raw(msgspec.json.encode(document)),
        inline(b"{}"),
        {SOLVER: AgentRef("solver", "1.0.0", "d", "core-wasm", 1, 1, 1)},
        "d",
        1,
    )


class Case:
    """A task of a job, its judges and its decision; `write` appends all of it."""

    def __init__(self, task: dict[str, Any], rule: Any, outputs: Sequence[Any]) -> None:
        self.job, self.task = new_id(), new_id()
        self.document = {"apiVersion": "hive/v1", "kind": "Job", "name": "judged", "tasks": [task]}
        self.rule = rule
        self.given = inline(b'{"n":1}')
        self.values: dict[int, Value] = {}
        self.payloads: dict[int, bytes] = {}
        self.candidates: list[Candidate] = []
        for attempt, output in enumerate(outputs, 1):
            data = msgspec.json.encode(output)
            self.payloads[attempt], self.values[attempt] = data, inline(data)
            key = key_of(rule.equal, data) if rule.k > 1 else ""
            place = msgspec.structs.astuple(producer(attempt))
            self.candidates.append(Candidate(*place, digest=digest_of(data), key=key))
        self.pairs: list[Pair] = []
        self.judges: list[Judge] = []
        self.judge_events: dict[str, list[Event]] = {}
        self.before: list[Event] = []
        self.running: list[Producer] = []
        self.replicas = len(outputs)
        self.chosen: int | None = None
        self.trust = 0
        self.end: Event | None = None
        self.after: list[Event] = []

    def asked(self, kind: Any, attempts: tuple[int, ...], answer: dict[str, Any], by: int = 9) -> None:
        """Add a judge that was asked about attempts, and answered."""
        stream, place = new_id(), producer(by)
        outputs = [msgspec.json.decode(self.payloads[one]) for one in attempts]
        question = {
            "pairs": {"a": outputs[0], "b": outputs[-1]},
            "senior": {"candidates": outputs},
        }.get(kind, {"output": outputs[0]})
        self.judge_events[stream] = [
            TaskCreated(
                job=self.job,
                step="answer",
                agent=CRITIC,
                input=inline(msgspec.json.encode({"input": {"n": 1}, **question})),
                judging=Judging(kind, self.task, attempts),
            ),
            assigned(place, 1),
            AttemptSucceeded(1, inline(msgspec.json.encode(answer))),
            TaskSucceeded(1),
        ]
        self.judges.append(Judge(kind, CRITIC, stream, msgspec.structs.replace(place, attempt=1), attempts))

    def scored(self, attempt: int, name: str, value: Any) -> None:
        """Let a critic or a test judge one result."""
        self.asked("critic" if name == "score" else "test", (attempt,), {name: value, "why": "so"})
        at = attempt - 1
        self.candidates[at] = msgspec.structs.replace(self.candidates[at], **{name: value})

    def decision(self) -> Decision:
        """Return the record of what the rule gives."""
        outcome = judge(self.rule, self.candidates, self.pairs, self.running)
        assert isinstance(outcome, Decided | Kept | Escalate | Failed), outcome
        return decision_of(
            self.task,
            self.rule,
            outcome,
            candidates=self.candidates,
            pairs=self.pairs,
            judges=self.judges,
            running=self.running,
            chosen=self.chosen,
        )

    def events(self, decision: Decision) -> list[Event]:
        """Return the events of the judged task."""
        made: list[Event] = [TaskCreated(self.job, "answer", SOLVER, input=self.given, replicas=self.replicas)]
        made += [assigned(one) for one in (*self.candidates, *self.running)]
        made += [AttemptSucceeded(attempt, value) for attempt, value in self.values.items()]
        taken = decision.votes[0] if decision.outcome == "kept" else decision.winner
        end = TaskFailed(decision.reason or "no_quorum") if taken is None else TaskSucceeded(taken)
        return [*made, *self.before, TaskDecided(decision, self.trust), self.end or end]

    async def write(self, database: Database, decision: Decision | None = None) -> str:
        """Append the job, the judges and the task, and return the task's id."""
        recorded = self.decision() if decision is None else decision
        streams = {
            self.job: [submitted(self.document)],
            **self.judge_events,
            self.task: self.events(recorded),
        }
        await append(database, self.job, streams)
        if self.after:
            await append(database, self.job, {self.job: self.after}, first=2)
        return self.task


FAILED_AND_REPLACED: list[Event] = [
    assigned(producer(3), 3),
    AttemptFailed(3, "agent_error", "no"),
    TaskExtended(1, "retry"),
]
