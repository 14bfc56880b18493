"""Joins see exactly what their rule allows, whatever fails, whoever crashes, and whenever the time is over."""

from collections import Counter
from typing import Any

import hypothesis.strategies as st
import msgspec
from hive_common.contracts import events, values
from hive_common.contracts.events import Child, Event, StepJoined
from hive_common.judgement.equality import key_of
from hive_scheduler.domain import job as jobs
from hive_scheduler.domain.joining import is_closing, next_due_us
from hive_scheduler.domain.task import TaskState
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from .joins import SECOND_US, Fails, Play

WHICH = st.integers(0, 20)
TOLERANT = [{"on_failure": "skip"}, {"on_failure": "default", "default": "none"}]
ON_FAILURE = st.sampled_from([{}, *TOLERANT, *TOLERANT])
JOINS = st.sampled_from(["all", "vote", {"rank": {"top": 2}}, {"integrator": {"agent": "sum@1"}}])
ANSWERS = st.sampled_from([["a"], ["a", "b"], ["a", "b", "a"], ["b", "a"], ["b"], Fails(), Fails("timeout")])
SCORES = st.sampled_from([0.5, 0.5, 1, -1])
"""A negative one makes a result count for nothing."""


class Joins(RuleBasedStateMachine):
    """A job of which a fork plans, a fork over all plans is joined, and the last task reads what came of it."""

    play: Play | None = None

    @initialize(
        size=st.sampled_from([0, 1, 2, 2, 3]),
        first=ON_FAILURE,
        second=ON_FAILURE,
        join=JOINS,
        minimum=st.sampled_from([0, 0, 1, 2]),
        read=WHICH,
        lazy=st.integers(0, 3),
    )
    def submit(
        self,
        size: int,
        first: dict[str, Any],
        second: dict[str, Any],
        join: Any,
        minimum: int,
        read: int,
        lazy: int,
    ) -> None:
        plan = {"id": "plan", "fork": list(range(size)), "input": "${item}", **first}
        flat = "${tasks.plan.output[]}"
        work = {"id": "work", "needs": ["plan"], "fork": flat, "input": "${item}", "minimum": minimum, **second}
        if isinstance(join, dict) and "rank" in join:
            work["verify"] = {"critic": {"agent": "critic@1"}}
        last = {"id": "last", "needs": ["work"], "input": {"all": "${tasks.work.output}"}}
        output = {"work": "${tasks.work.output}", "forked": "${tasks.work.forked}"}
        if read > 15:
            output["plan"] = "${tasks.plan.output}"
        self.lazy = lazy
        self.play = Play(plan, work | {"join": join}, last, output=output)

    @property
    def job(self) -> jobs.JobState:
        assert self.play is not None
        return self.play.job

    def among(self, *statuses: str) -> list[TaskState]:
        return [] if self.play is None else [one for one in self.job.tasks.values() if one.status in statuses]

    # --- what may happen ---

    @precondition(lambda self: self.among("ready"))
    @rule(which=WHICH, answer=ANSWERS, score=SCORES, forks=st.sampled_from([0, 0, 1]), decide=st.booleans())
    def work(self, which: int, answer: Any, score: float, forks: int, decide: bool) -> None:
        found = self.among("ready")
        task = found[which % len(found)]
        if self.job.closing(self.now_us) is not None:
            return
        if task.judging is not None and task.judging.kind == "critic":
            answer = {"score": score}
        child = forks and task.step == "work" and task.parent is None and task.judging is None
        assert self.play is not None
        self.play.attempt(task, answer, forks=(Child("a@1", msgspec.Raw(b"1")),) if child else ())
        if decide:
            self.settle()

    @precondition(lambda self: self.play is not None and self.job.end is None)
    @rule(most=st.sampled_from([1, 2, 50]))
    def decide(self, most: int) -> None:
        assert self.play is not None
        self.play.advance(most)

    @precondition(lambda self: self.play is not None and self.job.end is None)
    @rule()
    def settle(self) -> None:
        """Let the job decide all that is due: then nothing waits for what cannot come, or came too late."""
        assert self.play is not None
        self.play.advance()
        if self.job.end is not None:
            return
        for state in self.job.steps.values():
            bad = sum(1 for task in state.tasks if task.status in ("failed", "cancelled"))
            closed = [self.job.steps[one] for one in {"plan": ["work"], "work": ["last"]}.get(state.step.id, [])]
            is_over = any(one.joined is not None and one.joined.closed for one in closed)
            reads = self.job.spec.output.steps if self.job.spec.output is not None else ()
            if is_over and state.step.id not in reads:
                assert not state.open
            elif state.joins and state.joined is None:
                assert state.size is None or state.size - bad >= state.step.minimum
                if state in self.job.closers:
                    assert self.now_us < self.job.deadline_us - self.job.reserves_us[state.step.id]

    @rule(seconds=st.sampled_from([1, 5]))
    def time_passes(self, seconds: int) -> None:
        assert self.play is not None
        self.play.now_us += seconds * SECOND_US

    @precondition(lambda self: self.play is not None and self.job.end is None and self.job.closers)
    @rule(really=st.integers(0, 4), before_us=st.sampled_from([0, 0, 1]))
    def wait_for_the_time_of_a_step(self, really: int, before_us: int) -> None:
        assert self.play is not None
        due_us = next_due_us(self.job, self.now_us)
        if really == 4 and due_us < self.job.deadline_us:
            self.play.now_us = max(due_us - before_us, self.now_us)

    @rule()
    def crash(self) -> None:
        assert self.play is not None
        self.play.crash()

    @property
    def now_us(self) -> int:
        assert self.play is not None
        return self.play.now_us

    # --- the laws ---

    @invariant()
    def a_step_is_joined_once_after_all_its_tasks_and_before_who_reads_it(self) -> None:
        if self.play is None:
            return
        joined: set[str] = set()
        step_of: dict[str, str] = {}
        open_: Counter[str] = Counter()
        for stream, event in self.play.log:
            if isinstance(event, StepJoined):
                assert event.step not in joined
                assert open_[event.step] == 0
                joined.add(event.step)
            elif isinstance(event, events.TaskCreated):
                step_of[stream] = event.step
                integrates = event.judging is not None and event.judging.kind == "integrator"
                assert (event.step in joined) == integrates
                open_[event.step] += 1
                if event.step == "last" and event.input is not None:
                    assert "work" in joined or not self.job.steps["work"].joins
            elif type(event).__name__ in events.TASK_TERMINAL:
                open_[step_of[stream]] -= 1

    @invariant()
    def joins_see_what_the_rule_allows(self) -> None:
        if self.play is None:
            return
        for at, (_, event) in enumerate(self.play.log):
            if isinstance(event, StepJoined):
                self.check(event, self.play.log[:at])

    def check(self, joined: StepJoined, before: list[tuple[str, Event]]) -> None:
        step = self.job.steps[joined.step].step
        made = ((stream, event) for stream, event in before if isinstance(event, events.TaskCreated))
        ours = ((s, e) for s, e in made if e.step == joined.step and e.parent is None and e.judging is None)
        places = {stream: event.index or 0 for stream, event in ours}
        ends = {places[s]: e for s, e in before if s in places and type(e).__name__ in events.TASK_TERMINAL}
        good = sorted(index for index, end in ends.items() if isinstance(end, events.TaskSucceeded))
        assert len(good) >= step.minimum
        if step.on_failure == "fail":
            assert not any(isinstance(end, events.TaskFailed) for end in ends.values())
            assert len(good) == len(ends) or joined.closed
        bad = tuple(sorted(set(ends) - set(good)))
        replaced = step.on_failure == "default"
        # Those that were not even made are missing as well.
        assert (joined.defaulted if replaced else joined.missing)[: len(bad)] == bad or joined.closed
        assert set(bad) <= set(joined.defaulted if replaced else joined.missing)
        assert not (joined.missing if replaced else joined.defaulted)
        if bad:
            assert joined.partial
        going_on = sorted({*good, *joined.defaulted})
        match joined.kind:
            case "all" | "integrator":
                assert list(joined.order) == going_on
                assert bool(joined.task) == (joined.kind == "integrator")
            case "rank":
                self.check_ranked(joined, going_on)
            case "vote":
                self.check_voted(joined, good)

    def values_of(self, step: str) -> dict[int, bytes]:
        outputs = ((index, task.output) for index, task in enumerate(self.job.steps[step].tasks))
        return {index: output.raw for index, output in outputs if output is not None and output.raw is not None}

    def check_ranked(self, joined: StepJoined, going_on: list[int]) -> None:
        assert self.play is not None
        scores = {}
        for index, task in enumerate(self.job.steps[joined.step].tasks):
            if index in going_on and task.decision is not None and task.decision.winner is not None:
                scores[index] = next(
                    one.score for one in task.decision.candidates if one.attempt == task.decision.winner
                )
        best = sorted(going_on, key=lambda index: (-(scores.get(index) or 0) if index in scores else 9, index))
        assert list(joined.order) == best[:2]

    def check_voted(self, joined: StepJoined, good: list[int]) -> None:
        equal = self.job.steps[joined.step].step.join.equal
        assert equal is not None
        keys = {index: key_of(equal.rule, raw) for index, raw in self.values_of(joined.step).items()}
        if self.job.end is not None:
            return  # values are forgotten
        assert sorted(keys) == good
        counts = Counter(keys.values())
        if not good:
            assert joined.order == ()
            return
        (winner,) = joined.order
        most = max(counts.values())
        assert winner == min(index for index in good if counts[keys[index]] == most)
        assert joined.votes == tuple(index for index in good if keys[index] == keys[winner])
        assert bool(joined.tied) == (list(counts.values()).count(most) > 1)

    @invariant()
    def nothing_is_closed_before_its_time(self) -> None:
        if self.play is None:
            return
        times = [self.job.deadline_us - one for one in self.job.reserves_us.values()]
        partial = [e for _, e in self.play.log if isinstance(e, events.TaskCancelled) and e.reason == "partial"]
        closed = [e for _, e in self.play.log if isinstance(e, StepJoined) and e.closed]
        assert not (partial or closed) or self.now_us >= min(times)
        if self.job.end is None:
            late = [one for one in self.job.closers if one.joined is None and not one.closed]
            times = [self.job.deadline_us - self.job.reserves_us[one.step.id] for one in late]
            coming = [time for time in times if time > self.now_us]
            assert next_due_us(self.job, self.now_us) <= min([*coming, self.job.deadline_us])
            assert all(
                is_closing(self.job, one, self.now_us) for one in late if self.now_us >= self.job.deadline_us
            )

    def teardown(self) -> None:
        """Whatever happened, the job comes to its end once executors do their work, and gives what it may."""
        if self.play is None:
            return
        for _ in range(100):
            if self.job.end is None:
                self.settle()
            if self.job.end is not None:
                break
            # Some do nothing more until the time of a step is over.
            lazy = self.lazy and next_due_us(self.job, self.now_us) < self.job.deadline_us
            self.play.now_us = next_due_us(self.job, self.now_us) if lazy else self.now_us + SECOND_US
            for task in [] if lazy else self.among("ready")[:: self.lazy or 1]:
                if self.job.closing(self.now_us) is None:
                    critic = task.judging is not None and task.judging.kind == "critic"
                    self.play.attempt(task, {"score": 1} if critic else ["a"])
        end = self.job.end
        assert end is not None
        assert all(task.ended for task in self.job.tasks.values())
        if isinstance(end, events.JobFailed):
            known = {
                "agent_error",
                "timeout",
                "too_few_results",
                "deadline_exceeded",
                "invalid_fork",
                "no_valid_result",
            }
            assert end.code in known, end
            return
        assert isinstance(end, events.JobSucceeded)
        replayed = self.play.replay()
        assert replayed.end == end
        self.check_output(end)

    def check_output(self, end: events.JobSucceeded) -> None:
        assert self.play is not None
        assert end.output.raw is not None
        found = msgspec.json.decode(end.output.raw)["work"]
        outputs: dict[str, values.Value] = {}
        for stream, event in self.play.log:
            if isinstance(event, events.AttemptSucceeded):
                outputs[stream] = event.output
        state = self.job.steps["work"]
        given = [outputs[one.id].raw if one.id in outputs else None for one in state.tasks]
        plain = [None if raw is None else msgspec.json.decode(raw) for raw in given]
        joined = state.joined
        if joined is None:
            assert found == plain
        elif joined.task:
            assert found == msgspec.json.decode(outputs[joined.task].raw or b"")
        else:
            listed = ["none" if index in joined.defaulted else plain[index] for index in joined.order]
            assert found == ((listed or ["none"])[0] if joined.kind == "vote" else listed)


Joins.TestCase.settings = settings(max_examples=100, stateful_step_count=40, derandomize=True)
TestJoins = Joins.TestCase
