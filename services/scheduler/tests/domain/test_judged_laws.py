"""The laws of `test_laws` for jobs whose results are judged, and the laws of decisions."""

from typing import Any

import hypothesis.strategies as st
import msgspec
from hive_common.contracts import events
from hive_common.contracts.judgement import Embedding, Producer
from hive_common.judgement.record import Same, recompute
from hive_scheduler.domain import job as jobs
from hive_scheduler.domain.inputs import Evaluator
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.task import TaskState
from hypothesis import settings
from hypothesis.stateful import invariant, rule

from .test_laws import Laws

STEPS = ("first", "best", "kept", "senior", "pairs", "vectors", "trusted")
ANSWERS: dict[str, tuple[dict[str, Any], ...]] = {
    "critic": ({"score": 0.2}, {"score": 0.9}),
    "test": ({"passed": False}, {"passed": True}),
    "vector": ({"vector": [1, 0.5]}, {"vector": [0.0, -2]}),
    "pairs": ({"equal": False}, {"equal": True}),
    "senior": ({"choice": None}, {"choice": 0}),
}
"""What judges say: against it, and for it."""


def document(max_attempts: int, codes: tuple[str, ...]) -> dict[str, Any]:
    retry = {"max_attempts": max_attempts, "backoff": "1s", "codes": list(codes)}
    common = {"agent": "a@1.0.0", "retry": retry}
    executors = {"distinct": "executor"}
    steps: list[dict[str, Any]] = [
        {"id": "first", "fork": "${input}", "verify": {"quorum": {"k": 2, "of": 3}}, "speculate": executors},
        {"id": "best", "speculate": {"replicas": 3}, "verify": {"test": {"agent": "t@1.0.0"}}},
        {
            "id": "kept",
            "speculate": {"replicas": 2, "keep": "all"},
            "verify": {"critic": {"agent": "c@1.0.0", "min_score": 0.5}},
        },
        {
            "id": "senior",
            "verify": {"quorum": {"k": 2, "of": 2, "on_none": "escalate"}, "senior": {"agent": "s@1.0.0"}},
        },
        {"id": "pairs", "verify": {"quorum": {"k": 2, "of": 3, "equal": {"critic": {"agent": "p@1.0.0"}}}}},
        {
            "id": "vectors",
            "verify": {"quorum": {"k": 2, "of": 3, "equal": {"embedding": {"min": 0.9, "agent": "v@1.0.0"}}}},
        },
        {"id": "trusted", "verify": {"quorum": {"k": 2, "of": 3, "adaptive": True}}},
    ]
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "judged",
        "limits": {"deadline": "1000s", "fan_out": 20},
        "tasks": [
            *({**common, **step} for step in steps),
            {**common, "id": "join", "needs": list(STEPS), "input": "${tasks.kept.output}"},
        ],
        "output": {step: f"${{tasks.{step}.output}}" for step in STEPS},
    }


class Ports(Evaluator):
    """What is known of executors, as it was drawn."""

    trusted: int | None = None
    extends = True
    out = False

    def trust(self, job: JobState, task: TaskState, producer: Producer) -> int | None:
        return self.trusted

    def may_extend(self, job: JobState, task: TaskState) -> bool:
        return self.extends and not self.out

    def gone(self, job: JobState, task: TaskState) -> int:
        return task.wanted if self.out else 0


class JudgedLaws(Laws):
    """A job of replicas, quorums and judges."""

    def __init__(self) -> None:
        super().__init__()
        self.trusted: int | None = None
        self.extends = True
        self.out = False

    def make_document(self, max_attempts: int, codes: tuple[str, ...]) -> dict[str, Any]:
        return document(max_attempts, codes)

    def takes(self, task: TaskState) -> bool:
        return task.judged is None or task.wanted > 0

    def place_of(self, task: TaskState, executor: str) -> str:
        # Nobody judges what it made itself: that is for placement to see to.
        return executor if task.judging is None else f"judge {executor}"

    def result_of(self, task: TaskState, result: Any) -> Any:
        if task.judging is None:
            return result
        return ANSWERS[task.judging.kind][int(len(result) > 1)]

    def advance(self, most: int) -> bool:
        is_left = super().advance(most)
        if not is_left:
            # Nothing is due any more: nobody judges what is decided.
            for state in self.job.steps.values():
                for judged, judges in state.judges_of.items():
                    assert not self.job.tasks[judged].ended or all(judge.ended for judge in judges)
        return is_left

    def teardown(self) -> None:
        super().teardown()
        if self.log:
            self.each_decision_follows_from_what_it_records()
            self.what_judges_said_is_what_decisions_record()
            self.vectors_are_held_as_long_as_they_are_compared()
            self.attempts_are_no_more_than_the_rule_allows()

    def work_on(self, task: TaskState) -> None:
        # Judges do not all speak at once: what one says decides while another one is still at it.
        if task.judging is None or (int(task.id[-1], 16) + self.now_us // 1_000_000) % 2:
            super().work_on(task)

    def evaluator(self) -> Evaluator:
        ports = Ports(self.schemas, {}, frozenset())
        ports.trusted, ports.extends, ports.out = self.trusted, self.extends, self.out
        return ports

    @rule(trusted=st.sampled_from([None, 10]), extends=st.booleans())
    def what_is_known_of_executors_changes(self, trusted: int | None, extends: bool) -> None:
        self.trusted, self.extends = trusted, extends

    @rule()
    def executors_are_revoked(self) -> None:
        """For a moment nobody is left but who has something."""
        self.out = True
        jobs.look_again(self.job)
        self.advance(1_000)
        self.out = False
        for task in self.among():
            # Nothing waits any more for attempts alone that will never be made.
            if task.judged is not None and not task.ended and self.job.end is None and not task.live():
                assert self.judging_goes_on(task)

    def judging_goes_on(self, task: TaskState) -> bool:
        state = self.job.steps[task.step]
        if not self.job.needs_done(state) or task.status == "blocked":
            return True
        return any(judge.live() for judge in state.judges_of.get(task.id, ()))

    # --- the laws ---

    @invariant()
    def each_decision_follows_from_what_it_records(self) -> None:
        for at, (stream, event) in enumerate(self.log):
            if isinstance(event, events.TaskDecided):
                assert recompute(event.decision) == Same()
                # It and the end of its task are one decision.
                ending_stream, ending = self.log[at + 1]
                assert ending_stream == stream
                if isinstance(ending, events.TaskSucceeded):
                    first = min(event.decision.votes, default=0)
                    assert ending.attempt == (first if event.decision.outcome == "kept" else event.decision.winner)
                else:
                    assert isinstance(ending, events.TaskFailed)

    @invariant()
    def what_judges_said_is_what_decisions_record(self) -> None:
        said: dict[tuple[str, str, tuple[int, ...]], Any] = {}
        for stream, event in self.log:
            task = self.job.tasks.get(stream)
            if isinstance(event, events.AttemptSucceeded) and task is not None and task.judging is not None:
                judging = task.judging
                output = msgspec.json.decode(event.output.raw or b"")
                said[judging.kind, judging.task, judging.attempts] = next(iter(output.values()))
        for stream, event in self.log:
            if isinstance(event, events.TaskDecided):
                for one in event.decision.candidates:
                    assert one.score in (None, said.get(("critic", stream, (one.attempt,))))
                    assert one.passed in (None, said.get(("test", stream, (one.attempt,))))
                by_vectors = isinstance(event.decision.rule.equal, Embedding)
                digests = {one.attempt: one.digest for one in event.decision.candidates}
                for pair in event.decision.pairs:
                    if by_vectors:
                        one, other = said["vector", stream, (pair.a,)], said["vector", stream, (pair.b,)]
                        assert pair.equal == (one == other or digests[pair.a] == digests[pair.b])
                    else:
                        assert pair.equal == said["pairs", stream, (pair.a, pair.b)]

    @invariant()
    def vectors_are_held_as_long_as_they_are_compared(self) -> None:
        for task in self.among():
            if task.judged is not None:
                assert not (task.ended and task.judged.vectors)
                assert task.judged.vectors.keys() <= task.outputs.keys()
            if task.judging is not None and task.judging.kind == "vector":
                assert all(output.raw == b"null" for output in task.outputs.values())

    @invariant()
    def no_judged_task_succeeds_without_a_decision(self) -> None:
        for task in self.among():
            if task.judged is not None and task.status == "succeeded":
                assert task.decision is not None

    @invariant()
    def attempts_are_no_more_than_the_rule_allows(self) -> None:
        for task in self.among():
            words = self.job.steps[task.step].step.judging
            if task.judged is not None and words is not None:
                assert len(task.attempts) <= task.judged.planned
                assert task.judged.planned - task.judged.replaced <= max(words.rule.of, words.rule.extend_to)

    @invariant()
    def judges_are_asked_once_and_end_with_what_they_judge(self) -> None:
        if not self.log:
            return
        asked = [task.judging for task in self.among() if task.judging is not None]
        assert len(asked) == len(set(asked))
        for state in self.job.steps.values():
            assert state.judges_open == sum(not judge.ended for judge in state.judges)

    def check_output(self, end: events.JobSucceeded) -> None:
        found = msgspec.json.decode(end.output.raw or b"")
        for step in STEPS:
            outputs = [self.plain(task) for task in self.job.steps[step].tasks]
            assert found[step] == (outputs if step == "first" else outputs[0])

    def plain(self, task: TaskState) -> Any:
        """What the decision says that its output is."""
        decision = task.decision
        assert decision is not None
        chosen = decision.votes if decision.outcome == "kept" else (decision.winner,)
        results = [
            msgspec.json.decode(event.output.raw or b"")
            for attempt in chosen
            for stream, event in self.log
            if stream == task.id and isinstance(event, events.AttemptSucceeded) and event.attempt == attempt
        ]
        return results if decision.outcome == "kept" else results[0]


JudgedLaws.TestCase.settings = settings(max_examples=150, stateful_step_count=60)
TestJudgedLaws = JudgedLaws.TestCase
