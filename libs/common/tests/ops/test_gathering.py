import asyncio

from hive_common.ops.gathering import GATHERED_BYTES_MAX, Gathering


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


async def test_what_a_turn_of_the_loop_writes_goes_in_one_go_and_in_order() -> None:
    wire = Wire()
    gathering = Gathering(wire)
    for part in (b"head", b"", b"body"):
        gathering.write(part)
    assert wire.writes == [] and gathering.get_write_buffer_size() == 8
    await asyncio.sleep(0)
    assert wire.writes == [b"headbody"]
    gathering.write(b"next")
    gathering.flush()
    await asyncio.sleep(0)
    assert wire.writes == [b"headbody", b"next"] and gathering.get_write_buffer_size() == 0


async def test_what_is_long_does_not_wait_and_nothing_passes_it() -> None:
    wire = Wire()
    gathering = Gathering(wire)
    gathering.write(b"first ")
    gathering.write(b"x" * GATHERED_BYTES_MAX)
    gathering.write(b"last")
    assert wire.writes == [b"first " + b"x" * GATHERED_BYTES_MAX]
    await asyncio.sleep(0)
    assert wire.writes[1:] == [b"last"]


async def test_closing_sends_what_is_there() -> None:
    wire = Wire()
    gathering = Gathering(wire)
    gathering.write(b"the end")
    gathering.close()
    assert wire.writes == [b"the end"] and wire.is_closed
    await asyncio.sleep(0)
    assert len(wire.writes) == 1
