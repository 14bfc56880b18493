import asyncio

import pytest
from hive_common.ops.gathering import GATHER_S, GATHERED_BYTES_MAX, Gathering, HeadHeld


class Wire(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.is_closed = False

    def write(self, data: bytes) -> None:  # type: ignore[override]
        assert not self.is_closed
        self.writes.append(bytes(data))

    def get_write_buffer_size(self) -> int:
        return 0

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Set the time by its only item."""
    now = [100.0]
    monkeypatch.setattr("hive_common.ops.gathering.time.perf_counter", lambda: now[0])
    return now


async def test_the_first_goes_at_once_and_what_follows_it_soon_goes_together(clock: list[float]) -> None:
    wire = Wire()
    gathered = Gathering(wire)
    for part in (b"first", b"second", b"", b"third"):
        gathered.write(part)
    assert wire.writes == [b"first"] and gathered.get_write_buffer_size() == 11
    await asyncio.sleep(0)
    assert wire.writes == [b"first", b"secondthird"] and gathered.get_write_buffer_size() == 0
    gathered.write(b"fourth")
    clock[0] += 2 * GATHER_S
    gathered.write(b"later")
    assert wire.writes[2:] == [b"fourthlater"]
    await asyncio.sleep(0)
    assert len(wire.writes) == 3


async def test_what_is_long_does_not_wait_and_nothing_passes_it(clock: list[float]) -> None:
    wire = Wire()
    gathered = Gathering(wire)
    for part in (b"first", b"second", b"x" * GATHERED_BYTES_MAX, b"last"):
        gathered.write(part)
    assert wire.writes == [b"first", b"second" + b"x" * GATHERED_BYTES_MAX]
    await asyncio.sleep(0)
    assert wire.writes[2:] == [b"last"]


async def test_a_head_goes_with_its_body_or_alone_where_none_follows() -> None:
    wire = Wire()
    held = HeadHeld(wire)
    held.expect_head()
    for part in (b"head", b"body", b"more"):
        held.write(part)
    assert wire.writes == [b"headbody", b"more"]
    held.expect_head()
    held.write(b"head of a stream")
    await asyncio.sleep(0)
    assert wire.writes[2:] == [b"head of a stream"]


async def test_closing_sends_what_is_there() -> None:
    wire = Wire()
    held = HeadHeld(wire)
    held.expect_head()
    held.write(b"the end")
    held.close()
    assert wire.writes == [b"the end"] and wire.is_closed
    await asyncio.sleep(0)
    assert len(wire.writes) == 1
