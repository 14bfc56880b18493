"""A job as a tree: steps, tasks, attempts with executors and scores, judges, decisions and joins.

The live view, `hive job tree` and `hive job show` draw with it. What is large is summed up: of a step that has many
tasks the interesting ones are drawn, and the others are counted.
"""

import math
from collections.abc import Iterable
from itertools import islice
from typing import Any, Final

import msgspec
from hive_common.contracts.judgement import Rule
from hive_common.judgement.words import rule_in_words
from rich.text import Text
from rich.tree import Tree

from hive_cli.commands.tracking import (
    LIVE,
    TASK_STATES,
    TERMINAL_STATES,
    TrackedAttempt,
    TrackedStep,
    TrackedTask,
    Tracker,
)
from hive_cli.output import clean

LINES_MAX: Final = 12
"""Attempts, and judges, of one task that are drawn."""
NUMBERS_MAX: Final = 12
"""Numbers in one list, such as those of missing results."""
WHY_CHARACTERS_MAX: Final = 120

STYLES: Final = {
    "blocked": "dim",
    "ready": "yellow",
    "active": "cyan",
    LIVE: "cyan",
    "succeeded": "green",
    "failed": "red",
    "lost": "red",
    "cancelled": "magenta",
}


class Drawing:
    """Draws a tracker.

    Args:
        names: of executors by id.
        limit: tasks that are drawn of each step, and of what each task forked.
        now_us: time up to which attempts that run have run.
    """

    def __init__(self, tracker: Tracker, names: dict[str, str], limit: int, now_us: int = 0) -> None:
        self._tracker = tracker
        self._names = names
        self._limit = limit
        self._now_us = now_us or tracker.seen_us

    def tree(self, title: str) -> Tree:
        """Return the whole job, below its title unless that is empty; steps in the order in which they began."""
        tree = Tree(Text(title, style="bold"), guide_style="dim", hide_root=not title)
        for step in sorted(self._tracker.steps.values(), key=_began_us):
            self._step(tree, step, step.roots)
        return tree

    def details(self) -> Tree | None:
        """Return what a table of tasks leaves out: attempts, judges, decisions, joins. None: nothing of it."""
        tree = Tree("", guide_style="dim", hide_root=True)
        for step in self._tracker.steps.values():
            told = [task for task in _apart(step) if task.told_apart and task.judging is None]
            if told or step.join is not None or step.judges:
                self._step(tree, step, told, below=False)
        return tree if tree.children else None

    def _step(self, tree: Tree, step: TrackedStep, tasks: list[TrackedTask], below: bool = True) -> None:
        line = Text(clean(step.name), style="bold")
        line.append(f"  {clean(step.agent)}  ", style="not bold dim")
        total = sum(step.counts.values())
        for state in TASK_STATES:
            if total > 1 and step.counts[state]:
                line.append(f" {step.counts[state]} {state}", style=f"not bold {STYLES[state]}")
        branch = tree.add(line)
        chosen = self._chosen(tasks, step) if below else tasks[: self._limit]
        rules = [task.decision["rule"] for task in chosen if task.decision is not None and "rule" in task.decision]
        if rules:
            # It is the step's, and the same for all of its tasks.
            branch.add(Text(f"rule: {rule_in_words(msgspec.convert(rules[0], Rule))}", style="dim"))
        self._tasks(branch, chosen, len(tasks), below)
        for judge in step.judges:
            self._judge(branch, judge)
        if step.join is not None:
            branch.add(_join(step.join))

    def _chosen(self, tasks: list[TrackedTask], step: TrackedStep) -> list[TrackedTask]:
        if len(tasks) <= self._limit:
            return tasks
        wanted: dict[str, TrackedTask] = {}
        for group in (step.failed, step.active, step.noted):
            for task in islice(group.values(), self._limit):
                if len(wanted) < self._limit and not task.parent and task.judging is None:
                    wanted.setdefault(task.id, task)
        for task in islice(tasks, self._limit):
            if len(wanted) < self._limit:
                wanted.setdefault(task.id, task)
        return sorted(wanted.values(), key=lambda task: -1 if task.index is None else task.index)

    def _tasks(self, branch: Tree, chosen: list[TrackedTask], total: int, below: bool) -> None:
        for task in chosen:
            self._task(branch, task, below)
        if total > len(chosen):
            branch.add(Text(f"and {total - len(chosen)} more", style="dim"))

    def _task(self, branch: Tree, task: TrackedTask, below: bool) -> None:
        line = Text("task" if task.index is None else f"[{task.index}]")
        if task.parent:
            line.append(f" {clean(task.agent)}", style="dim")
        line.append(f" {task.state}", style=STYLES[task.state])
        if not task.told_apart:
            for attempt in task.attempts.values():
                line.append(f"  {self._name(attempt.executor)}  {self._time(attempt)}", style="dim")
        if task.why:
            line.append(f"  {_short(task.why)}", style="red")
        node = branch.add(line)
        if task.told_apart:
            self._attempts(node, task)
        for judge in islice(task.judges, LINES_MAX):
            self._judge(node, judge)
        _more(node, len(task.judges), "judges")
        if task.decision is not None:
            node.add(Text(outcome_in_words(task.decision, task.trust), style="bold"))
        if below:
            self._tasks(node, task.children[: self._limit], len(task.children), below)

    def _attempts(self, node: Tree, task: TrackedTask) -> None:
        decision = task.decision or {}
        for attempt in islice(task.attempts.values(), LINES_MAX):
            line = Text(f"#{attempt.number} {self._name(attempt.executor)} ")
            line.append(attempt.state, style=STYLES[attempt.state])
            line.append(f"  {self._time(attempt)}", style="dim")
            line.append(_verdict({"score": attempt.score, "passed": attempt.passed}))
            if attempt.number == decision.get("winner"):
                line.append("  ★ winner", style="bold green")
            elif attempt.number in decision.get("votes", ()):
                line.append("  ✓ kept" if decision.get("outcome") == "kept" else "  ✓ vote", style="green")
            if attempt.why:
                line.append(f"  {_short(attempt.why)}", style="red")
            node.add(line)
        _more(node, len(task.attempts), "attempts")
        wanted = task.planned - len(task.attempts)
        if task.state not in TERMINAL_STATES and wanted > 0:
            node.add(Text(f"{wanted} more wanted", style="yellow"))

    def _judge(self, node: Tree, judge: TrackedTask) -> None:
        judging = judge.judging or {}
        line = Text(f"{judging.get('kind', 'judge')} {clean(judge.agent)}", style="blue")
        attempts = judging.get("attempts", ())
        if attempts:
            line.append(f" of {_attempts(attempts)}")
        line.append(f" {judge.state}", style=STYLES[judge.state])
        for attempt in islice(judge.attempts.values(), LINES_MAX):
            ended = f" {attempt.state}: {_short(attempt.why)}" if attempt.why else ""
            line.append(f"  {self._name(attempt.executor)}  {self._time(attempt)}{ended}", style="dim")
        line.append(_verdict(judge.verdict))
        if "choice" in judge.verdict:
            choice = judge.verdict["choice"]
            chosen = attempts[choice] if isinstance(choice, int) and 0 <= choice < len(attempts) else None
            line.append("  chose none" if chosen is None else f"  chose #{chosen}")
        if judge.why and judge.why != "decided":
            line.append(f"  {_short(judge.why)}", style="red")
        node.add(line)

    def _name(self, executor: str) -> str:
        return clean(self._names.get(executor, executor[:8]))

    def _time(self, attempt: TrackedAttempt) -> str:
        until_us = attempt.ended_us or self._now_us
        return f"{max(0, until_us - attempt.started_us) / 1e6:.2f} s"


def _apart(step: TrackedStep) -> list[TrackedTask]:
    """Return the tasks of a step, those that something happened to first, with what they forked."""
    first = {**step.failed, **step.active, **step.noted}
    rest: dict[str, TrackedTask] = {}
    stack = [*reversed(step.roots)]
    while stack:
        task = stack.pop()
        rest[task.id] = task
        stack += reversed(task.children)
    return [*{**first, **rest}.values()]


def place(task: dict[str, Any]) -> str:
    """Return where a task stands in its job: its step, and its number where there are several."""
    return clean(task["step"] if task["index"] is None else f"{task['step']}[{task['index']}]")


def outcome_in_words(decision: dict[str, Any], trust: int = 0) -> str:
    """Return what was decided, in a few words."""
    votes, winner = decision.get("votes", ()), decision.get("winner")
    match decision.get("outcome"):
        case "decided" if trust:
            return f"decided: #{winner}, without another one after {trust} valid results of its executor in a row"
        case "decided" if len(votes) > 1:
            return f"decided: #{winner} with {len(votes)} votes ({_attempts(votes)})"
        case "decided":
            return f"decided: #{winner}"
        case "kept":
            return f"kept: {_attempts(votes)}"
        case "escalated" if winner is None:
            return f"escalated: a senior agent took none of {_attempts(votes)}"
        case "escalated":
            return f"escalated: a senior agent chose #{winner} of {_attempts(votes)}"
    return f"nothing decided: {decision.get('reason', '')}"


def join_in_words(join: dict[str, Any]) -> str:
    """Return what became of a step's results."""
    kind, order = join.get("kind", ""), join.get("order", ())
    parts = {
        "vote": f"[{order[0]}] won with {len(join.get('votes', ()))} votes" if order else "nobody won",
        "rank": f"the best first: {_numbers(order)}",
        "integrator": "an integrator made one of them",
    }
    said = [f"joined by {kind}: {parts[kind]}" if kind in parts else f"joined: {len(order)} results"]
    for name, words in (("tied", "as many votes"), ("missing", "missing"), ("defaulted", "by default")):
        if numbers := join.get(name):
            said.append(f"{words}: {_numbers(numbers)}")
    said += ["partial"] if join.get("partial") else []
    said += ["the time was running out"] if join.get("closed") else []
    return "; ".join(said)


def _began_us(step: TrackedStep) -> float:
    """Return when the first tasks of a step began; one that has not comes last. Not of all: it is drawn often."""
    attempts = (attempt for task in islice(step.roots, LINES_MAX) for attempt in task.attempts.values())
    return min((attempt.started_us for attempt in attempts), default=math.inf)


def _join(join: dict[str, Any]) -> Text:
    return Text(join_in_words(join), style="bold yellow" if join.get("partial") else "bold")


def _attempts(numbers: Iterable[int]) -> str:
    listed = list(numbers)
    more = f" and {len(listed) - NUMBERS_MAX} more" if len(listed) > NUMBERS_MAX else ""
    return " ".join(f"#{one}" for one in listed[:NUMBERS_MAX]) + more


def _numbers(numbers: Iterable[int]) -> str:
    listed = list(numbers)
    more = f" and {len(listed) - NUMBERS_MAX} more" if len(listed) > NUMBERS_MAX else ""
    return ", ".join(map(str, listed[:NUMBERS_MAX])) + more


def _verdict(said: dict[str, Any]) -> str:
    parts = []
    if isinstance(score := said.get("score"), int | float):
        parts.append(f"score {score:g}")
    if isinstance(passed := said.get("passed"), bool):
        parts.append("passed" if passed else "did not pass")
    if isinstance(equal := said.get("equal"), bool):
        parts.append("equal" if equal else "not equal")
    return "".join(f"  {part}" for part in parts)


def _short(text: str) -> str:
    line = clean(" ".join(text.split()))
    return line if len(line) <= WHY_CHARACTERS_MAX else line[: WHY_CHARACTERS_MAX - 1] + "…"


def _more(node: Tree, count: int, what: str) -> None:
    if count > LINES_MAX:
        node.add(Text(f"and {count - LINES_MAX} more {what}", style="dim"))
