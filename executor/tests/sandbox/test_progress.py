"""How far a guest says it is: what it may say, and how little of it leaves the device."""

import asyncio
import json
from collections.abc import Callable

import pytest
from hive_common.kernel.errors import InvalidArgument
from hive_executor.host import Marks, always
from hive_executor.host.progress import PAUSE_MS, ProgressAccess, permille_of
from hive_executor.sandbox import Program, RunnerPool

from .conftest import limits, python

STEPS = 21
"""Twentieths of the work that may be passed, and what is said before the first."""
SAY = python(
    "from hive import progress\n"
    "def run(input):\n"
    "    seen = []\n"
    "    for value in [*input['values'], float('nan')]:\n"
    "        try:\n"
    "            seen.append(progress(value))\n"
    "        except Exception as error:\n"
    "            seen.append(f'{type(error).__name__}: {error}')\n"
    "    return {'seen': seen}\n"
)
FLOOD = python(
    "from hive import progress\n"
    "def run(input):\n"
    "    for n in range(1, input['calls'] + 1):\n"
    "        progress(n / input['calls'])\n"
    "    while input['forever']:\n"
    "        progress(1)\n"
    "    return {}\n"
)


async def test_a_guest_says_how_far_it_is_and_hears_what_cannot_be_meant(pool: RunnerPool) -> None:
    said: list[int] = []
    values = [0.1, 1 / 3, 0.29, 1 / 3, 0, -1, 1.01, 1e300, True, "0.5", None, 1]
    given = json.dumps({"values": values}).encode()
    outcome = await pool.run(SAY, given, limits(), granted=always(said.append))
    assert outcome.output is not None, outcome
    seen = json.loads(outcome.output)["seen"]
    assert [None if one is None else one.partition(":")[0] for one in seen] == [
        *(None, None, "ValueError", None, "ValueError", "ValueError", "ValueError", "ValueError"),
        *("TypeError", "TypeError", "TypeError", None, "ValueError"),
    ]
    assert "said before" in seen[2]
    assert said == [100, 333, 333, 1_000]


async def test_a_component_says_it_over_the_interface_of_its_own(
    pool: RunnerPool, module: Callable[[str], Program]
) -> None:
    said: list[int] = []
    program = module("progress_component")
    outcome = await pool.run(program, b'{"fraction": 0.29}', limits(), granted=always(said.append))
    assert (outcome.output, said) == (b"{}", [290]), outcome
    for wrong in (b'{"fraction": 0}', b'{"fraction": "all"}', b"{}", b"0.5", b'{"fraction": 0.5, "of": 2}'):
        outcome = await pool.run(program, wrong, limits(), granted=always(said.append))
        assert (outcome.code, outcome.message) == ("agent_error", "invalid_argument")
    assert said == [290]


async def test_a_flood_is_the_guests_own_time_and_little_of_it_leaves(pool: RunnerPool) -> None:
    told: list[int] = []
    marks = Marks(told.append)
    outcome = await pool.run(FLOOD, b'{"calls": 2000, "forever": false}', limits(), granted=always(marks.said))
    assert outcome.output == b"{}", outcome
    assert 0 < len(told) <= STEPS and told == sorted(told)
    endless = Marks(told.append)
    given = b'{"calls": 1, "forever": true}'
    outcome = await pool.run(FLOOD, given, limits(wall_ms=300), granted=always(endless.said))
    assert outcome.code == "timeout", outcome
    marks.close()
    endless.close()


async def test_requests_that_are_none_are_refused() -> None:
    access = ProgressAccess(lambda permille: None)
    for operation, request in (
        ("say", b'{"fraction": 0.5}'),
        ("mark", b""),
        ("mark", b'{"fraction": NaN}'),
        ("mark", b'{"fraction": 1e999}'),
        ("mark", b'{"fraction": true}'),
        ("mark", b"[" * 5_000),
    ):
        with pytest.raises(InvalidArgument):
            await access.call(operation, request, 1_000)
    assert await access.call("mark", b'{"fraction": 5e-324}', 1_000) == b"{}"


def test_thousandths_are_whole_and_never_none() -> None:
    assert [permille_of(n / 100) for n in range(1, 101)] == [10 * n for n in range(1, 101)]
    assert (permille_of(1e-9), permille_of(0.9999)) == (1, 999)


class Clock:
    """A loop's clock and its timers, set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_ms = 0
        self.due: list[tuple[float, Callable[[], None]]] = []
        loop = asyncio.get_running_loop()
        monkeypatch.setattr(loop, "time", lambda: self.now_ms / 1000, raising=False)
        monkeypatch.setattr(loop, "call_later", self._later, raising=False)

    def _later(self, wait_s: float, call: Callable[[], None]) -> asyncio.Handle:
        self.due.append((self.now_ms + 1000 * wait_s, call))
        return asyncio.Handle(call, (), asyncio.get_running_loop())

    def until(self, ms: int) -> None:
        self.now_ms = ms
        due, self.due = [one for one in self.due if one[0] <= ms], [one for one in self.due if one[0] > ms]
        for _, call in due:
            call()


@pytest.fixture
async def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


async def test_the_first_leaves_at_once_and_then_the_newest_after_each_pause(clock: Clock) -> None:
    told: list[int] = []
    marks = Marks(told.append)
    marks.said(10)
    assert told == [10]
    marks.said(100)
    marks.said(149)
    assert told == [10]
    clock.until(PAUSE_MS)
    assert told == [10, 149], "what the guest says last is heard, though it says no more"
    clock.until(10 * PAUSE_MS)
    marks.said(149)
    assert told == [10, 149], "no news"
    marks.said(150)
    assert told == [10, 149, 150]
    assert marks.told == 150


async def test_of_ten_thousand_marks_over_an_hour_few_leave(clock: Clock) -> None:
    told: list[int] = []
    marks = Marks(told.append)
    for n in range(1, 10_001):
        clock.until(n * 360)
        marks.said(permille_of(n / 10_000))
    assert told == [1, *range(50, 1_001, 50)] and len(told) == STEPS
