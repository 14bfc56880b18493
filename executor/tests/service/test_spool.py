import asyncio
import contextlib
import errno
import os
import threading

import msgspec
import pytest
from hive_common.contracts.messages import AttemptKey, AttemptReport
from hive_common.contracts.values import inline
from hive_executor import spool as spool_module
from hive_executor.spool import Spool


def report(n, output=b"{}", session="s1"):
    return AttemptReport(
        task=f"task-{n}", attempt=1, session=session, status="succeeded", ended_us=n, output=inline(output)
    )


def key(n):
    return AttemptKey(f"task-{n}", 1)


@contextlib.asynccontextmanager
async def opened(folder, **limits):
    spool = Spool(folder, **({"reports_max": 1000, "bytes_max": 1 << 20} | limits))
    spool.open()
    writer = asyncio.create_task(spool.run())
    try:
        yield spool
    finally:
        writer.cancel()
        await asyncio.wait({writer})
        await spool.close()


def disk_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.spool"))


async def test_outcomes_survive_a_restart_in_their_order_and_with_their_bytes(tmp_path):
    async with opened(tmp_path) as spool:
        for n in range(50):
            spool.add(report(n))
        await spool.written()
    async with opened(tmp_path) as spool:
        assert spool.keys == tuple(key(n) for n in range(50))
        assert [msgspec.json.decode(s.body, type=AttemptReport) for s in spool.batch(1 << 20, 1000)] == [
            report(n) for n in range(50)
        ]


async def test_settled_outcomes_do_not_come_back(tmp_path):
    async with opened(tmp_path) as spool:
        for n in range(3):
            spool.add(report(n))
        await spool.written()
        spool.settle([key(0), key(2)])
        spool.add(report(3))
        await spool.written()
        spool.settle([key(3)])
    async with opened(tmp_path) as spool:
        assert spool.keys == (key(1),)
        spool.settle([key(1)])
    assert disk_bytes(tmp_path) == len(spool_module.MAGIC)


async def test_an_outcome_that_is_being_written_while_it_closes_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "WRITE_AFTER_S", 0)
    for n in range(20):
        spool = Spool(tmp_path, reports_max=100, bytes_max=1 << 20)
        spool.open()
        writer = asyncio.create_task(spool.run())
        await asyncio.sleep(0)
        spool.add(report(n))
        for _ in range(n % 5):
            await asyncio.sleep(0)
        writer.cancel()
        await asyncio.wait({writer})
        await spool.close()
    async with opened(tmp_path) as spool:
        assert spool.keys == tuple(key(n) for n in range(20))


async def test_what_is_answered_in_time_never_costs_a_write(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "WRITE_AFTER_S", 0.05)
    writes = []
    monkeypatch.setattr(Spool, "_write", lambda self, records: writes.extend(records))
    async with opened(tmp_path) as spool:
        writes.clear()
        spool.add(report(1))
        spool.settle([key(1)])
        await spool.written()
        assert len(spool) == 0
    assert writes == []


async def test_what_is_answered_while_it_is_written_does_not_come_back(tmp_path, monkeypatch):
    monkeypatch.setattr(spool_module, "WRITE_AFTER_S", 0)
    syncing, may_sync = threading.Event(), threading.Event()
    sync = Spool._sync

    def slow_sync(self):
        syncing.set()
        assert may_sync.wait(20)
        sync(self)

    async with opened(tmp_path) as spool:
        spool.add(report(1))
        await spool.written()
        monkeypatch.setattr(Spool, "_sync", slow_sync)
        spool.add(report(2))
        spool.add(report(3))
        await asyncio.to_thread(syncing.wait, 20)
        spool.settle([key(2)])
        may_sync.set()
        await spool.written()
        assert spool.keys == (key(1), key(3))
    async with opened(tmp_path) as spool:
        assert spool.keys == (key(1), key(3))


async def test_the_disk_is_given_back_once_everything_is_settled(tmp_path):
    async with opened(tmp_path, bytes_max=64 << 20) as spool:
        for n in range(30):
            spool.add(report(n, output=b'"' + b"x" * 250_000 + b'"'))
            await spool.written()
        assert len(list(tmp_path.glob("*.spool"))) > 1
        spool.settle([key(n) for n in range(30)])
        spool.add(report(99))
        await spool.written()
        spool.settle([key(99)])
        deadline = asyncio.get_running_loop().time() + 10
        while disk_bytes(tmp_path) > 100:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)
        assert len(list(tmp_path.glob("*.spool"))) == 1


async def test_a_batch_keeps_to_its_size_and_has_at_least_one(tmp_path):
    async with opened(tmp_path) as spool:
        for n in range(4):
            spool.add(report(n, output=b'"' + b"x" * 1000 + b'"'))
        assert [s.key for s in spool.batch(10, 1000)] == [key(0)]
        assert len(spool.batch(2500, 1000)) == 2
        assert len(spool.batch(1 << 20, 1000)) == 4
        assert len(spool.batch(1 << 20, 3)) == 3


async def test_it_is_full_by_number_and_by_bytes(tmp_path):
    async with opened(tmp_path / "a", reports_max=2) as spool:
        assert spool.room == 2
        spool.add(report(1))
        assert spool.room == 1
        spool.add(report(2))
        assert spool.room == 0
        spool.add(report(3))  # what runs already is kept nevertheless
        spool.settle([key(1), key(2)])
        assert spool.room == 1
    async with opened(tmp_path / "b", bytes_max=1000) as spool:
        spool.add(report(1, output=b'"' + b"x" * 1000 + b'"'))
        assert spool.room == 0


@pytest.mark.parametrize("cut", [1, 5, 9, 40])
async def test_a_record_that_was_cut_short_costs_only_itself(tmp_path, cut):
    async with opened(tmp_path) as spool:
        for n in range(3):
            spool.add(report(n))
    (segment,) = tmp_path.glob("*.spool")
    segment.write_bytes(segment.read_bytes()[:-cut])
    async with opened(tmp_path) as spool:
        assert spool.keys == (key(0), key(1))
        spool.add(report(7))
    assert len(list(tmp_path.glob("*.damaged"))) == 1
    async with opened(tmp_path) as spool:
        assert spool.keys == (key(0), key(1), key(7))


async def test_every_single_flipped_byte_is_survived(tmp_path):
    async with opened(tmp_path / "good") as spool:
        for n in range(3):
            spool.add(report(n))
    (segment,) = (tmp_path / "good").glob("*.spool")
    good = segment.read_bytes()
    originals = {key(n): report(n) for n in range(3)}
    for position in range(len(good)):
        folder = tmp_path / f"flip-{position}"
        folder.mkdir()
        damaged = bytearray(good)
        damaged[position] ^= 0x5A
        (folder / segment.name).write_bytes(damaged)
        spool = Spool(folder, reports_max=10, bytes_max=1 << 20)
        spool.open()
        kept = {s.key: msgspec.json.decode(s.body, type=AttemptReport) for s in spool.batch(1 << 20, 1000)}
        assert kept.items() <= originals.items()
        assert len(kept) < 3
        assert list(folder.glob("*.damaged"))
        await spool.close()


async def test_a_segment_that_was_just_being_made_is_no_damage(tmp_path):
    for number, data in enumerate((b"", spool_module.MAGIC[:5], spool_module.MAGIC)):
        (tmp_path / f"{number + 1:08d}.spool").write_bytes(data)
    async with opened(tmp_path) as spool:
        assert len(spool) == 0
    assert not list(tmp_path.glob("*.damaged"))


async def test_a_full_disk_keeps_the_outcome_waiting_until_there_is_room(tmp_path, monkeypatch):
    write, is_full = os.write, True

    def full_write(handle, data):
        if is_full:
            # As a disk does: a part of it fits.
            write(handle, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    monkeypatch.setattr(spool_module, "RETRY_S", 0.02)
    async with opened(tmp_path) as spool:
        spool.add(report(1))
        await spool.written()
        monkeypatch.setattr(spool_module.os, "write", full_write)
        spool.add(report(2))
        while spool.problem is None:
            await asyncio.sleep(0.005)
        assert "No space left" in spool.problem
        assert spool.room == 0
        assert [spooled.key for spooled in spool.batch(1 << 20, 10)] == [
            key(1),
            key(2),
        ]  # it is reported all the same
        is_full = False
        await spool.written()
        assert spool.problem is None
    async with opened(tmp_path) as spool:
        assert spool.keys == (key(1), key(2))
    assert not list(tmp_path.glob("*.damaged"))


async def test_a_disk_is_tried_again_though_what_it_failed_to_write_was_answered(tmp_path, monkeypatch):
    write, is_full = os.write, True

    def full_write(handle, data):
        if is_full:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(handle, data)

    monkeypatch.setattr(spool_module, "RETRY_S", 0.02)
    async with opened(tmp_path) as spool:
        monkeypatch.setattr(spool_module.os, "write", full_write)
        spool.add(report(1))
        while spool.problem is None:
            await asyncio.sleep(0.005)
        spool.settle([key(1)])
        await spool.written()
        await asyncio.sleep(0.2)  # some tries
        assert spool.problem is not None and spool.room == 0
        is_full = False
        while spool.problem is not None:
            await asyncio.sleep(0.005)
        assert spool.room > 0
    assert [path.suffix for path in tmp_path.iterdir()] == [".spool"]


async def test_what_another_session_left_is_known(tmp_path):
    async with opened(tmp_path) as spool:
        spool.add(report(1, session="old"))
    async with opened(tmp_path) as spool:
        spool.add(report(2, session="new"))
        assert spool.holds_other_session("new")
        spool.settle([key(1)])
        assert not spool.holds_other_session("new")
