"""Tasks that tasks fork: what an attempt staged, who is whose child, and what of it is still to be made.

A child is a task of its parent's step. It exists once its parent is decided, so there is nothing to undo: of an
attempt that was lost, or came late, no child was ever made.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import msgspec
from hive_common.contracts.events import Child
from hive_common.kernel.ids import derive_child_id
from hive_common.permissions.actions import fork_action

from hive_scheduler.domain.approval import ApprovalState
from hive_scheduler.domain.task import TaskState


class Family:
    """What one task forked.

    Attributes:
        staged: what its attempt staged; nothing any more once all of it is made.
        size: how many that were.
        children: ids of those that are made, in order.
    """

    __slots__ = ("children", "size", "staged")

    def __init__(self, staged: tuple[Child, ...]) -> None:
        self.staged = staged
        self.size = len(staged)
        self.children: list[str] = []

    @property
    def complete(self) -> bool:
        """All children are made."""
        return len(self.children) == self.size

    def add(self, child: str) -> None:
        """Count the next child as made."""
        self.children.append(child)
        if self.complete:
            self.staged = ()


class Forks:
    """All that tasks of one job forked; empty for most jobs.

    Attributes:
        claims: what attempts staged that have not decided their task (yet), by task and number.
        families: by the parent's id.
        below: how many descendants a task has, or will have once all are made.
    """

    def __init__(self) -> None:
        self.claims: dict[tuple[str, int], tuple[Child, ...]] = {}
        self.families: dict[str, Family] = {}
        self.below: dict[str, int] = {}

    def decide(self, task: TaskState, attempt: int, tasks: Mapping[str, TaskState]) -> int:
        """Count what the deciding attempt of a task staged as children to be made, and return how many."""
        staged = self.claims.pop((task.id, attempt), ())
        if staged:
            self.families[task.id] = Family(staged)
            for ancestor in (task, *ancestors(task, tasks)):
                self.below[ancestor.id] = self.below.get(ancestor.id, 0) + len(staged)
        return len(staged)

    def descendants(self, task_id: str) -> Iterator[str]:
        """Yield the ids of all tasks below one: each child followed by what is below it."""
        stack = [task_id]
        while stack:
            current = stack.pop()
            if current != task_id:
                yield current
            family = self.families.get(current)
            if family is not None:
                stack += reversed(family.children)

    def forget_values(self) -> None:
        """Drop what was staged and not made: the job has ended."""
        self.claims.clear()
        for family in self.families.values():
            family.staged = ()

    def snapshot(self) -> dict[str, Any]:
        """Return what the log determines (job.snapshot)."""
        return {
            "claims": sorted(f"{task}-{attempt}" for task, attempt in self.claims),
            "families": {parent: (family.size, list(family.children)) for parent, family in self.families.items()},
            "below": dict(self.below),
        }


def all_approved(task: TaskState, wanted: Sequence[Child], approvals: Iterable[ApprovalState]) -> bool:
    """Say whether children are what a person approved of: each call of the guest that staged some is one action."""
    approved = [
        (one.hash, msgspec.json.decode(one.action)["what"])
        for one in approvals
        if one.task == task.id and one.permission == "fork" and one.status == "approved"
    ]
    inputs = [bytes(child.input) for child in wanted]
    # So many bytes of JSON lists end before each of them, with a comma for each element.
    before = [0, *accumulate(len(one) + 1 for one in inputs)]
    # Where calls may begin: what was approved of is found one behind the other, without a gap.
    begins = {0}
    for first in range(len(wanted)):
        if first not in begins:
            continue
        for hash_, what in approved:
            end = first + what["tasks"]
            if end > len(wanted) or before[end] - before[first] + 1 != what["inputs"]["bytes"]:
                continue
            same = all(child.agent == what["agent"] for child in wanted[first:end])
            if same and fork_action(task.agent, what["agent"], inputs[first:end]).hash == hash_:
                begins.add(end)
    return len(wanted) in begins


def ancestors(task: TaskState, tasks: Mapping[str, TaskState]) -> Iterator[TaskState]:
    """Yield the parent of a task, its parent, and so on; nothing for one that was not forked."""
    while task.parent is not None:
        task = tasks[task.parent]
        yield task


def child_id_of(parent: str, index: int) -> str:
    """Return the id that a child always has, however often its creation is tried."""
    return derive_child_id(parent, "fork", str(index))
