"""Why tasks wait that nobody has, told from the devices as they are now."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from hive_common.contracts.judgement import Distinct

from hive_scheduler.domain.deciding import producer_of
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.needs import distinct_of, need_of
from hive_scheduler.domain.placement import Fleet, Need
from hive_scheduler.domain.shortage import in_words, shortage_of, units_of
from hive_scheduler.domain.task import LIVE, TaskState


class _Kind(NamedTuple):
    """What is the same of many tasks that wait."""

    need: Need
    wanted: int
    distinct: Distinct
    held: int
    judges: bool


def waits_for(job: JobState, task_ids: Iterable[str], fleet: Fleet) -> Mapping[str, str]:
    """Return what these tasks of an open job wait for, by their ids: those that lack more than their turn."""
    found: dict[str, str] = {}
    known: dict[_Kind, str] = {}
    for task in filter(None, map(job.tasks.get, task_ids)):
        if task.wanted:
            kind = _kind_of(job, task)
            if kind not in known:
                shortage = shortage_of(kind.need, kind.wanted, kind.distinct, fleet.devices(), kind.held)
                known[kind] = in_words(shortage, kind.distinct, kind.judges)
            if known[kind]:
                found[task.id] = known[kind]
    return found


def _kind_of(job: JobState, task: TaskState) -> _Kind:
    distinct = distinct_of(job, task)
    holding = [number for number, one in task.attempts.items() if one.status in LIVE or one.status == "succeeded"]
    held = units_of(distinct, [producer_of(task, number) for number in holding])
    judges = task.judging is not None and task.judging.task != ""
    return _Kind(need_of(job, task), task.wanted, distinct, held, judges)
