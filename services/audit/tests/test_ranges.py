"""A log checked in ranges, by several processes, gets the verdict that one process gives it."""

import os
import signal
from collections.abc import Callable, Sequence

import pytest
from hive_audit import checks
from hive_audit.checks import verify_log
from hive_audit.log_source import LogSource
from hive_audit.range_processes import RangeProcesses
from hive_audit.ranges import Checked, Range, RangeCheck, join
from hive_audit.verifier import NO_HASH, Head, Result, Row, StreamHeads, Verifier
from hive_common.eventlog.envelope import leaf_hash, prepare, splice
from hive_common.eventlog.log import Append, LogWriter
from hive_common.kernel.errors import Unavailable
from hive_common.testing.fixtures import Database
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import Tamper
from .histories import event, fill

LOG = "0199c0de-0000-7000-8000-000000000000"
PROCESSES = 2
RANGE = 20


# --- the join, without a database ---


def chain(steps: Sequence[tuple[str, int, str]]) -> list[Row]:
    """Rows whose hashes and commitments hold, whatever their streams do. The first is the genesis event."""
    rows: list[Row] = []
    prev = NO_HASH
    for position, (stream, version, type_) in enumerate([(LOG, 1, "LogCreated"), *steps], start=1):
        payload = b'{"log":"%s"}' % LOG.encode() if position == 1 else b"{}"
        salt = bytes([position % 256]) * 32
        envelope = splice(position, prev.hex(), prepare(LOG, event(stream, version, type_, payload), salt)[0])
        prev = leaf_hash(envelope)
        rows.append((position, stream, version, type_, envelope, prev, payload, salt))
    return rows


def in_one_go(rows: list[Row]) -> Verifier:
    verifier = Verifier()
    verifier.feed(rows)
    return verifier


def in_ranges(rows: list[Row], cuts: list[int]) -> Verifier:
    """Check the first range, then join the others; at the first that does not fit go on in one go."""
    verifier = Verifier()
    first, *others = [*cuts, len(rows)]
    if verifier.feed(rows[:first]) is None:
        after = first
        for until in others:
            range_ = Range(after, until, LOG)
            checking = RangeCheck(range_, rows[after - 1][5])
            checking.feed(rows[after:until])
            if not join(verifier, range_, checking.finish()):
                verifier.feed(rows[after:])
                break
            after = until
    return verifier


TYPES = ("TaskCreated", "TaskAssigned", "TaskSucceeded", "TaskFailed")


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[str, int, str]]:
    """Streams that mostly go on as they should, and sometimes not."""
    heads: dict[str, int] = {}
    ended: set[str] = set()
    steps = []
    for _ in range(draw(st.integers(1, 40))):
        stream = draw(st.sampled_from("abcdef"))
        version = heads.get(stream, 0) + 1 + draw(st.sampled_from([0] * 30 + [-1, 1]))
        type_ = draw(st.sampled_from(TYPES if stream not in ended or draw(st.integers(0, 20)) == 0 else TYPES[:2]))
        if version < 1:
            continue
        heads[stream] = version
        if type_ in TYPES[2:]:
            ended.add(stream)
        steps.append((stream, version, type_))
    return steps


@settings(max_examples=300)
@given(histories(), st.data())
def test_ranges_joined_say_what_one_go_says(steps: list[tuple[str, int, str]], data: st.DataObject) -> None:
    rows = chain(steps)
    cuts = data.draw(st.lists(st.integers(1, len(rows)), min_size=1, max_size=6, unique=True).map(sorted))
    whole, parts = in_one_go(rows), in_ranges(rows, cuts)
    assert parts.finish() == whole.finish()
    if whole.broken is None:
        assert parts.heads.states == whole.heads.states


def joined(steps: list[tuple[str, int, str]], cut: int, change: Callable[[Checked], Checked] | None = None) -> bool:
    rows = chain(steps)
    verifier = in_one_go(rows[:cut])
    range_ = Range(cut, len(rows), LOG)
    checking = RangeCheck(range_, rows[cut - 1][5])
    checking.feed(rows[cut:])
    checked = checking.finish()
    before = (verifier.position, verifier.head_hash, dict(verifier.heads.states))
    fits = join(verifier, range_, change(checked) if change else checked)
    assert fits or (verifier.position, verifier.head_hash, verifier.heads.states) == before
    return fits


def test_range_fits_only_behind_its_own_beginning() -> None:
    good = [("a", 1, "TaskCreated"), ("b", 1, "TaskCreated"), ("a", 2, "TaskSucceeded"), ("a", 3, "Noted")]
    assert joined(good, 3)
    assert not joined(good, 3, lambda checked: Checked(True, bytes(32), checked.end_hash, *streams(checked)))
    assert not joined([("a", 1, "TaskCreated"), ("a", 1, "TaskCreated")], 2), "begins twice"
    assert not joined([("a", 1, "TaskCreated"), ("a", 3, "TaskCreated")], 2), "a version is left out"
    assert not joined([("a", 1, "TaskCreated"), ("b", 2, "TaskCreated")], 2), "does not begin at its beginning"
    assert not joined([("a", 1, "TaskFailed"), ("a", 2, "TaskFailed")], 2), "ends twice"
    assert joined([("a", 1, "TaskFailed"), ("a", 2, "Noted")], 2)


def streams(checked: Checked) -> tuple[dict[str, int], dict[str, tuple[int, int]]]:
    return checked.begun, checked.continued


def test_end_before_a_range_is_remembered_behind_it() -> None:
    rows = chain([("a", 1, "TaskFailed"), ("a", 2, "Noted"), ("a", 3, "TaskFailed")])
    verifier = in_ranges(rows, [2, 3])
    assert verifier.broken is not None and verifier.broken.position == 4
    assert "second terminal" in verifier.broken.reason


# --- with processes, on a database ---


async def in_processes(database: Database, against: Head | None = None, streams_max: int = 1000) -> Result:
    async with await LogSource.open(database.role_dsn("audit")) as source:
        return await verify_log(source, against, streams_max=streams_max, processes=PROCESSES, range_events=RANGE)


async def in_this_process(database: Database, against: Head | None = None) -> Result:
    async with await LogSource.open(database.role_dsn("audit")) as source:
        return await verify_log(source, against, processes=0)


@pytest.fixture
def all_in_ranges(monkeypatch: pytest.MonkeyPatch) -> list[Range]:
    """Wait for the processes behind the first range, so that they get all others; lists what was joined."""
    joined_ranges: list[Range] = []
    started = RangeProcesses.__aenter__

    async def entered(processes: RangeProcesses) -> RangeProcesses:
        await started(processes)
        for task in processes._starting:
            await task
        return processes

    def noted(verifier: Verifier, range_: Range, checked: Checked) -> bool:
        fits = join(verifier, range_, checked)
        joined_ranges.extend([range_] if fits else [])
        return fits

    monkeypatch.setattr(RangeProcesses, "__aenter__", entered)
    monkeypatch.setattr(checks, "join", noted)
    return joined_ranges


async def test_untouched_log_verifies_and_nearly_all_of_it_in_other_processes(
    database: Database, all_in_ranges: list[Range]
) -> None:
    head = await fill(database, 60)
    result = await in_processes(database)
    assert result == await in_this_process(database)
    assert result.ok and result.events == head == 241
    assert [(range_.after, range_.until) for range_ in all_in_ranges] == [
        (after, min(after + RANGE, head)) for after in range(RANGE, head, RANGE)
    ]
    earlier = Head(head, bytes.fromhex(result.head_hash))
    assert (await in_processes(database, earlier)).ok
    assert (await in_processes(database, Head(90, earlier.hash))).first_bad_position == 90


async def test_streams_that_were_forgotten_are_looked_up(database: Database, all_in_ranges: list[Range]) -> None:
    await fill(database, 40)
    result = await in_processes(database, streams_max=3)
    assert result.ok and result.events == 161 and len(all_in_ranges) == 8


@pytest.mark.parametrize(
    "statements",
    [
        ["UPDATE log.events SET event = set_byte(event, 40, 65) WHERE position = 77"],
        ["UPDATE log.events SET event = set_byte(event, 40, 65) WHERE position = 80"],
        ["UPDATE log.events SET event = set_byte(event, 40, 65) WHERE position IN (81, 121)"],
        ["UPDATE log.events SET hash = set_byte(hash, 0, get_byte(hash, 0) # 1) WHERE position = 80"],
        ["UPDATE log.events SET hash = set_byte(hash, 0, get_byte(hash, 0) # 1) WHERE position = 81"],
        ["DELETE FROM log.events WHERE position = 80"],
        ["DELETE FROM log.events WHERE position = 81"],
        ["DELETE FROM log.events WHERE position BETWEEN 70 AND 130"],
        ["DELETE FROM log.events WHERE position > 70"],
        ["UPDATE log.events SET position = position + 1000000000000000 WHERE position = 90"],
        ["UPDATE log.events SET version = 99 WHERE position = 90"],
        ["UPDATE log.payloads SET payload = payload || ' ' WHERE position = 90"],
        ["DELETE FROM log.payloads WHERE position = 90"],
    ],
)
async def test_tampering_is_found_where_one_process_finds_it(
    database: Database, tamper: Tamper, all_in_ranges: list[Range], statements: list[str]
) -> None:
    await fill(database, 40)
    tamper(*statements)
    result = await in_processes(database)
    assert result == await in_this_process(database)
    assert not result.ok and result.first_bad_position >= 70
    assert len(all_in_ranges) >= 2, "what holds before it was found by the other processes"


async def test_second_end_in_another_range_is_found(
    database: Database, tamper: Tamper, all_in_ranges: list[Range]
) -> None:
    tamper("DROP INDEX log.events_terminal")
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        await writer.append(Append((event("t", 1, "TaskFailed"),)))
        await fill(database, 20)
        position = await writer.append(Append((event("t", 2, "TaskFailed"),)))
        await fill(database, 20)
    result = await in_processes(database)
    assert result == await in_this_process(database)
    assert result.first_bad_position == position and "second terminal" in result.reason


async def test_large_payloads_are_read_by_size(database: Database, all_in_ranges: list[Range]) -> None:
    payload = b'"' + b"x" * (1024 * 1024) + b'"'
    await fill(database, 10)
    async with await LogWriter.open(database.role_dsn("scheduler")) as writer:
        for number in range(1, 25):
            await writer.append(Append((event("large", number, "Noted", payload),)))
    result = await in_processes(database)
    assert result.ok and result.events == 65 and len(all_in_ranges) == 3


async def test_process_that_is_killed_makes_the_check_unavailable(
    database: Database, all_in_ranges: list[Range], monkeypatch: pytest.MonkeyPatch
) -> None:
    await fill(database, 40)
    entered = RangeProcesses.__aenter__

    async def killed(processes: RangeProcesses) -> RangeProcesses:
        await entered(processes)
        assert processes._process is not None
        os.killpg(processes._process.pid, signal.SIGKILL)
        return processes

    monkeypatch.setattr(RangeProcesses, "__aenter__", killed)
    with pytest.raises(Unavailable, match="ended before its time"):
        await in_processes(database)


@pytest.mark.parametrize("interpreter", ["/bin/false", "/no/such/python"])
async def test_log_is_verified_alone_where_no_process_can_be_started(
    database: Database, all_in_ranges: list[Range], monkeypatch: pytest.MonkeyPatch, interpreter: str
) -> None:
    head = await fill(database, 10)
    monkeypatch.setattr("sys.executable", interpreter)
    result = await in_processes(database)
    assert result.ok and result.events == head and all_in_ranges == []


async def test_check_without_a_database_is_unavailable(database: Database, all_in_ranges: list[Range]) -> None:
    await fill(database, 40)
    async with await LogSource.open(database.role_dsn("audit")) as source:
        source.dsn = "host=127.0.0.1 port=1 user=nobody"
        with pytest.raises(Unavailable, match="Postgres"):
            await verify_log(source, processes=PROCESSES, range_events=RANGE)


def test_streams_are_unknown_only_to_heads_that_forgot() -> None:
    heads = StreamHeads(2)
    for stream in "abc":
        heads.learn(stream, 1, False)
    assert heads.unknown(["d"]) == []
    heads.trim()
    assert set(heads.unknown("abcd")) == {"a", "d"}
