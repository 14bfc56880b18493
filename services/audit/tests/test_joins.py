"""Joins are made again from the ends of their tasks, and what was recorded otherwise is found."""

from collections.abc import Sequence
from typing import Any

import msgspec
import pytest
from hive_audit.decision_checks import decisions
from hive_audit.log_source import LogSource
from hive_common.artifacts.store import FolderStore
from hive_common.contracts.events import (
    AttemptSucceeded,
    Event,
    StepJoined,
    TaskAssigned,
    TaskCancelled,
    TaskCreated,
    TaskFailed,
    TaskSucceeded,
)
from hive_common.contracts.values import Value, by_digest, inline
from hive_common.kernel.ids import derive_child_id, new_id

from .judged import CRITIC, SOLVER, TASK, append, submitted
from .test_decisions import ONE, TWO, quorum_case

THREE = {"n": 3}


class Joins:
    """Writes steps and their joins, and checks them."""

    def __init__(self, database: Any, folder: Any) -> None:
        self.database = database
        self.store = FolderStore(folder)

    async def check(self, words: dict[str, Any], ends: Sequence[Any], joined: StepJoined) -> tuple[str, str]:
        """Write a fork whose tasks ended so (an output, or their last event) and its join, and check that."""
        job = new_id()
        task = {"id": "answer", "agent": SOLVER, "fork": "${input}", "input": "${item}", **words}
        document = {"apiVersion": "hive/v1", "kind": "Job", "name": "joins", "tasks": [task]}
        streams: dict[str, Sequence[Event]] = {}
        for index, end in enumerate(ends):
            if isinstance(end, Event):
                last: list[Event] = [end]
            else:
                value = end if isinstance(end, Value) else inline(msgspec.json.encode(end))
                last = [AttemptSucceeded(1, value), TaskSucceeded(1)]
            created = TaskCreated(job, "answer", SOLVER, index=index, input=inline(b"1"))
            made = [created, TaskAssigned(1, "e", "s", 1), *last]
            streams[derive_child_id(job, "answer", str(index))] = made
        await append(self.database, job, streams | {job: [submitted(document), joined]})
        return await self.again(job)

    async def again(self, job: str) -> tuple[str, str]:
        async with await LogSource.open(self.database.role_dsn("audit")) as source:
            found = [one async for one in decisions(source, self.store, job, 0, 50)]
        (check,) = [one for one in found if one.outcome == "joined"]
        assert (check.task, check.job, check.step) == ("", job, "answer")
        return check.result, "; ".join(check.reasons)


@pytest.fixture
def joins(database, tmp_path):
    return Joins(database, tmp_path / "artifacts")


VOTE = {"join": "vote"}
FAILED, CUT = TaskFailed("agent_error"), TaskCancelled("partial")
SKIP = {"on_failure": "skip"}
ENDED = [ONE, FAILED, TWO, ONE]
RIGHT = [
    (VOTE, [TWO, ONE, ONE], StepJoined("answer", "vote", order=(1,), votes=(1, 2), by="json")),
    (VOTE, [TWO, ONE], StepJoined("answer", "vote", order=(0,), votes=(0,), tied=(0, 1), by="json")),
    (
        {"join": {"vote": {"equal": {"numeric": {"absolute": 1.5}}}}},
        [{"n": 9}, ONE, TWO],
        StepJoined("answer", "vote", order=(1,), votes=(1, 2)),
    ),
    (SKIP, ENDED, StepJoined("answer", "all", order=(0, 2, 3), missing=(1,), partial=True)),
    (
        {"on_failure": "default", "default": 7},
        ENDED,
        StepJoined("answer", "all", order=(0, 1, 2, 3), defaulted=(1,), partial=True),
    ),
    (
        {"join": {"integrator": {"agent": "sum@1.0.0"}}},
        [ONE, CUT],
        StepJoined("answer", "integrator", order=(0,), missing=(1,), partial=True, closed=True),
    ),
    (VOTE | SKIP, ENDED, StepJoined("answer", "vote", order=(0,), votes=(0, 3), missing=(1,), partial=True)),
]


@pytest.mark.parametrize(("words", "ends", "joined"), RIGHT)
async def test_what_the_rule_gives_is_the_same(joins, words, ends, joined):
    assert await joins.check(words, ends, joined) == ("same", "")


@pytest.mark.parametrize(
    ("words", "ends", "joined", "said"),
    [
        (VOTE, [TWO, ONE, ONE], RIGHT[0][2], {"order": (0,)}),
        (VOTE, [TWO, ONE, ONE], RIGHT[0][2], {"votes": (0, 1, 2)}),
        (VOTE, [TWO, ONE], RIGHT[1][2], {"tied": ()}),
        (VOTE, [TWO, ONE, ONE], RIGHT[0][2], {"kind": "rank"}),
        (SKIP, ENDED, RIGHT[3][2], {"missing": ()}),
        (SKIP, ENDED, RIGHT[3][2], {"partial": False}),
        (SKIP, ENDED, RIGHT[3][2], {"order": (3, 2, 0)}),
        (RIGHT[4][0], ENDED, RIGHT[4][2], {"defaulted": ()}),
    ],
)
async def test_what_is_recorded_otherwise_is_found(joins, words, ends, joined, said):
    result, why = await joins.check(words, ends, msgspec.structs.replace(joined, **said))
    assert result == "differs" and next(iter(said)) in why


async def test_a_join_before_its_tasks_have_ended_is_found(joins):
    result, why = await joins.check(SKIP, [ONE, CUT], StepJoined("answer", "all", order=(0,), missing=(1,)))
    assert result == "differs" and "not all there" in why


async def test_a_vote_over_values_that_are_gone_is_not_checkable(joins):
    values = [by_digest(b'{"large":1}'), by_digest(b'{"large":1}')]
    joined = StepJoined("answer", "vote", order=(0,), votes=(0, 1))
    assert await joins.check(VOTE, values, joined) == (
        "not_checkable",
        "result 0 does not exist any more; result 1 does not exist any more",
    )
    await joins.store.put(b'{"large":1}')
    assert await joins.check(VOTE, values, joined) == ("same", "")


@pytest.mark.parametrize(("order", "result"), [((2, 1, 3), "same"), ((1, 2, 3), "differs")])
async def test_what_a_single_task_keeps_is_ranked_by_its_scores(joins, order, result):
    words = {
        **TASK,
        "join": {"rank": {}},
        "speculate": {"replicas": 3, "keep": "all", "distinct": "executor"},
        "verify": {"critic": {"agent": CRITIC, "min_score": 0.5}},
    }
    case = quorum_case(words, (ONE, TWO, THREE))
    case.task = derive_child_id(case.job, "answer", "0")
    for attempt, score in enumerate((0.6, 0.9, 0.5), 1):
        case.scored(attempt, "score", score)
    case.after = [StepJoined("answer", "rank", order=order)]
    await case.write(joins.database)
    assert (await joins.again(case.job))[0] == result
