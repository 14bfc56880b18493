"""The order in which ready tasks are placed."""

from hive_scheduler.domain.placement import Need
from hive_scheduler.domain.queue import ReadyQueue

PYTHON = Need("python", 1)
WASM = Need("component", 1)


def drain(queue: ReadyQueue, priority: str, need: Need) -> list[str]:
    found = []
    while (popped := queue.pop(priority, need)) is not None:
        found.append(popped[1])
    return found


def test_jobs_of_one_priority_take_turns_however_many_tasks_they_have() -> None:
    queue = ReadyQueue()
    for number in range(4):
        queue.push("normal", PYTHON, "big", f"b{number}")
    queue.push("normal", PYTHON, "small", "s0")
    assert drain(queue, "normal", PYTHON) == ["b0", "s0", "b1", "b2", "b3"]
    assert len(queue) == 0
    assert queue.needs("normal") == []


def test_a_need_that_was_served_waits_for_the_others() -> None:
    queue = ReadyQueue()
    for number in range(2):
        queue.push("high", PYTHON, "p", f"p{number}")
        queue.push("high", WASM, "w", f"w{number}")
    assert queue.needs("high") == [PYTHON, WASM]
    queue.pop("high", PYTHON)
    assert queue.needs("high") == [WASM, PYTHON]
    assert queue.needs("normal") == []


def test_the_tasks_of_a_job_can_be_dropped_together() -> None:
    queue = ReadyQueue()
    for need in (PYTHON, WASM):
        queue.push("low", need, "gone", "g")
    queue.push("low", PYTHON, "stays", "s")
    queue.drop_job("low", "gone")
    assert len(queue) == 1
    assert queue.needs("low") == [PYTHON]
    assert drain(queue, "low", PYTHON) == ["s"]
