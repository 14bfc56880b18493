"""An export can be checked without a database, and no byte of it can change unseen."""

import base64
import functools
import json
from pathlib import Path

import pytest
from hive_audit.checks import export_log
from hive_audit.export import Header, Writer, head_of, read_header, verify_file
from hive_audit.log_source import LogSource
from hive_audit.verifier import Row
from hive_common.eventlog.envelope import leaf_hash, prepare, splice
from hive_common.kernel.errors import CorruptLog, InvalidArgument
from hive_common.testing.fixtures import Database
from hypothesis import given, settings
from hypothesis import strategies as st

from .conftest import Tamper
from .histories import event, fill

LOG = "0199c0de-0000-7000-8000-000000000000"


def chain(count: int, payload: bytes = b'{"n":1}') -> list[Row]:
    """Rows of a good log, made without a database."""
    rows: list[Row] = []
    prev = "0" * 64
    for position in range(1, count + 1):
        stream, version = (LOG, 1) if position == 1 else (f"task-{position // 3}", 0)
        version = version or 1 + sum(1 for row in rows if row[1] == stream)
        data = json.dumps({"log": LOG}).encode() if position == 1 else payload
        new = event(stream, version, "LogCreated" if position == 1 else "TaskAssigned", data)
        salt = bytes([position % 256]) * 32
        envelope = splice(position, prev, prepare(LOG, new, salt)[0])
        rows.append((position, stream, version, new.type, envelope, leaf_hash(envelope), data, salt))
        prev = rows[-1][5].hex()
    return rows


def write(path: Path, rows: list[Row]) -> Path:
    writer = Writer()
    header = Header(1, LOG, 1, rows[-1][0], rows[-1][5].hex(), "2026-11-25T00:00:00.000000Z")
    path.write_bytes(b"".join([writer.header(header), *writer.events(rows), writer.trailer()]))
    return path


async def export(database: Database, path: Path, to: int = 0) -> Path:
    async with await LogSource.open(database.role_dsn("audit")) as source:
        with path.open("wb") as file:
            async for chunk in export_log(source, to, "2026-11-25T00:00:00.000000Z"):
                assert chunk.endswith(b"\n")
                file.write(chunk)
    return path


async def test_an_export_verifies_without_its_database(database: Database, tmp_path: Path) -> None:
    head = await fill(database, 20)
    path = await export(database, tmp_path / "log.ndjson")
    result = verify_file(path)
    assert result.ok and (result.events, result.head, result.log_id) == (head, head, database.log_id)
    assert read_header(path).to == head_of(path).position == head
    first = json.loads(path.read_text().splitlines()[1])
    assert json.loads(first["event"])["type"] == "LogCreated"
    assert json.loads(base64.b64decode(first["payload"])) == {"log": database.log_id}


async def test_a_later_export_holds_against_an_earlier_one_and_not_the_other_way(
    database: Database, tmp_path: Path
) -> None:
    await fill(database, 3)
    early = await export(database, tmp_path / "early")
    await fill(database, 3)
    late = await export(database, tmp_path / "late")
    assert verify_file(late, early).ok
    cut = verify_file(early, late)
    assert (cut.ok, cut.first_bad_position) == (False, 14)
    assert verify_file(await export(database, tmp_path / "part", to=13), early).ok


async def test_a_broken_log_is_not_exported(database: Database, tamper: Tamper, tmp_path: Path) -> None:
    await fill(database, 3)
    tamper("UPDATE log.events SET type = 'TaskReady' WHERE position = 5")
    with pytest.raises(CorruptLog, match="position 5"):
        await export(database, tmp_path / "log")
    assert not verify_file(tmp_path / "log").ok


async def test_an_export_past_the_head_is_refused(database: Database, tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="to: 9"):
        await export(database, tmp_path / "log", to=9)


@functools.cache
def _good(folder: Path) -> bytes:
    return write(folder / "good", chain(12, b'{"text":"\xf0\x9f\x90\x9d"}')).read_bytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("export")


@settings(max_examples=300)
@given(st.data())
def test_no_byte_can_be_flipped(folder: Path, data: st.DataObject) -> None:
    good = _good(folder)
    index = data.draw(st.integers(0, len(good) - 1))
    bits = data.draw(st.integers(1, 255))
    bad = bytearray(good)
    bad[index] ^= bits
    path = folder / "flipped"
    path.write_bytes(bad)
    result = verify_file(path)
    assert not result.ok and result.reason and result.first_bad_position > 0


@settings(max_examples=100)
@given(st.data())
def test_no_tail_can_be_cut(folder: Path, data: st.DataObject) -> None:
    good = _good(folder)
    path = folder / "cut"
    path.write_bytes(good[: data.draw(st.integers(0, len(good) - 1))])
    result = verify_file(path)
    assert not result.ok and result.reason


@settings(max_examples=100)
@given(st.data())
def test_no_lines_can_change_places_or_go(folder: Path, data: st.DataObject) -> None:
    lines = _good(folder).splitlines(keepends=True)
    changed = data.draw(st.permutations(lines) | st.just(lines[:5] + lines[6:]) | st.just([*lines, b"\n"]))
    path = folder / "moved"
    path.write_bytes(b"".join(changed))
    assert verify_file(path).ok is (changed == lines)


def test_a_file_rewritten_with_good_hashes_and_a_good_last_line_is_named_against_an_earlier_one(
    tmp_path: Path,
) -> None:
    early = write(tmp_path / "early", chain(20))
    late = write(tmp_path / "late", chain(30, b'{"n":2}'))
    assert verify_file(late).ok, "alone it is a good log"
    result = verify_file(late, early)
    assert (result.ok, result.first_bad_position, result.head) == (False, 2, 1)


def test_a_position_in_the_middle_is_named(tmp_path: Path) -> None:
    rows = chain(30)
    position, stream, version, type_, envelope, hash_, _, salt = rows[16]
    rows[16] = (position, stream, version, type_, envelope, hash_, b'{"n":2}', salt)
    result = verify_file(write(tmp_path / "log", rows))
    assert (result.first_bad_position, result.head) == (17, 16)


def test_what_is_no_export_says_so(tmp_path: Path) -> None:
    path = tmp_path / "text"
    path.write_text("hello\n")
    assert "not the header of an export" in verify_file(path).reason
    with pytest.raises(InvalidArgument, match="not the header"):
        read_header(path)
    with pytest.raises(InvalidArgument, match="cannot be read"):
        verify_file(tmp_path / "none")
    with pytest.raises(InvalidArgument, match="cannot be compared"):
        verify_file(write(tmp_path / "good", chain(3)), against=path)


def test_the_largest_envelope_and_payload_fit_the_line_limit(tmp_path: Path) -> None:
    rows = chain(3, b"x" * 4 * 1024 * 1024)
    assert verify_file(write(tmp_path / "log", rows)).ok
