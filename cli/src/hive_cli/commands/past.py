"""What happened in a job so far, from its events: for `hive job show` and `hive job tree`."""

from typing import TYPE_CHECKING, Any, Final

from hive_common.contracts.events import JOB_TERMINAL

from hive_cli.commands.drawing import join_in_words
from hive_cli.commands.tracking import TrackedTask, Tracker

if TYPE_CHECKING:
    from hive_cli.api import Api

EVENTS_MAX: Final = 50_000
"""Events that are read of one job; a fork of thousands of judged tasks fits in."""
PAGE_EVENTS: Final = 2_000


def tracked(api: "Api", job_id: str) -> tuple[Tracker, bool]:
    """Return a job as its events tell it, and whether all of them up to now were read."""
    tracker = Tracker()
    pages = api.pages(f"/v1/jobs/{job_id}/events", "events", "from_position", limit=PAGE_EVENTS)
    for number, event in enumerate(pages):
        if number == EVENTS_MAX:
            return tracker, False
        tracker.apply(event)
        if event["type"] in JOB_TERMINAL:
            break  # what is late changes nothing
    return tracker, True


def task_json(task: TrackedTask, names: dict[str, str]) -> dict[str, Any]:
    """Return for programs what a task's events tell, its attempts one by one."""
    return {
        "history": [
            {
                "attempt": one.number,
                "executor": one.executor,
                "name": names.get(one.executor, ""),
                "device": one.device,
                "state": one.state,
                "started_us": one.started_us,
                "ended_us": one.ended_us or None,
                "why": one.why,
                "score": one.score,
                "passed": one.passed,
            }
            for one in task.attempts.values()
        ],
        "judges": [judge.id for judge in task.judges],
        "extended": task.extended,
        "decision": task.decision,
        "trust": task.trust,
    }


def tree_json(job_id: str, tracker: Tracker, names: dict[str, str], complete: bool) -> dict[str, Any]:
    """Return the whole tree for programs: nothing is summed up."""
    return {
        "job_id": job_id,
        "ended": tracker.ended or None,
        "complete": complete,
        "steps": [
            {
                "step": step.name,
                "agent": step.agent,
                "counts": dict(+step.counts),
                "join": step.join,
                "join_words": None if step.join is None else join_in_words(step.join),
                "tasks": [_node(task, names) for task in step.roots],
                "judges": [_node(judge, names) for judge in step.judges],
            }
            for step in tracker.steps.values()
        ],
    }


def _node(task: TrackedTask, names: dict[str, str]) -> dict[str, Any]:
    return {
        "task_id": task.id,
        "index": task.index,
        "agent": task.agent,
        "state": task.state,
        "why": task.why,
        "replicas": task.replicas,
        "judging": task.judging,
        "verdict": task.verdict,
        **task_json(task, names),
        "judges": [_node(judge, names) for judge in task.judges],
        "children": [_node(child, names) for child in task.children],
    }
