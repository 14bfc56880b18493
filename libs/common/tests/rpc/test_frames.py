import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hive_common.kernel.errors import Unavailable
from hive_common.rpc.frames import Frames


class Text:
    """A message whose bytes are a text; `bad` is none."""

    def __init__(self, text: bytes) -> None:
        self.text = text

    @classmethod
    def parse(cls, data: bytes) -> "Text":
        if data == b"bad":
            raise ValueError("no message")
        return cls(data)

    def SerializeToString(self) -> bytes:
        return self.text


class End:
    """One end, and what came there."""

    def __init__(self) -> None:
        self.frames = Frames(Text.parse, self._took, self._lost)
        self.came: list[bytes] = []
        self.lost = asyncio.Event()
        self.wants = 0
        self.enough = asyncio.Event()

    def _took(self, message: Text) -> None:
        self.came.append(message.text)
        if len(self.came) == self.wants:
            self.enough.set()

    def _lost(self) -> None:
        self.lost.set()


@pytest.fixture
async def ends() -> AsyncIterator[tuple[End, End]]:
    here, there = End(), End()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: there.frames, "127.0.0.1", 0)
    async with server:
        await loop.create_connection(lambda: here.frames, "127.0.0.1", server.sockets[0].getsockname()[1])
        while not there.frames.is_open:
            await asyncio.sleep(0)
        yield here, there
        here.frames.abort()


@pytest.mark.parametrize("at_once", [1, 3, 7, 100_000])
def test_messages_are_cut_wherever_the_bytes_are(at_once: int) -> None:
    end = End()
    texts = [b"", b"a", b"x" * 300, b"", b"y" * 70_000, b"last"]
    data = b"".join(len(text).to_bytes(4, "big") + text for text in texts)
    for start in range(0, len(data), at_once):
        end.frames.data_received(data[start : start + at_once])
    assert end.came == texts


async def test_both_ends_send_in_order(ends: tuple[End, End]) -> None:
    here, there = ends
    texts = [b"%d" % number * 1000 for number in range(500)]
    here.wants = there.wants = len(texts)
    for text in texts:
        here.frames.send(Text(text))
        await here.frames.drain()
    await there.enough.wait()
    for text in texts:
        there.frames.send(Text(text))
    await here.enough.wait()
    assert here.came == there.came == texts


@pytest.mark.parametrize("sent", [b"bad", b"z" * 5_000])
async def test_what_cannot_be_taken_ends_the_connection(ends: tuple[End, End], sent: bytes) -> None:
    here, there = ends
    here.frames.send(Text(b"first"))
    there.frames.bytes_max = 4_000
    here.frames.send(Text(sent))
    here.frames.send(Text(b"after it"))
    await there.lost.wait()
    await here.lost.wait()
    assert there.came == [b"first"] and not here.frames.is_open
    here.frames.send(Text(b"nobody hears it"))
    with pytest.raises(Unavailable):
        await here.frames.drain()


async def test_whoever_waits_for_a_slow_reader_is_let_go_when_it_leaves(ends: tuple[End, End]) -> None:
    here, there = ends
    paused: Any = there.frames._transport
    paused.pause_reading()

    async def fill() -> None:
        while True:
            here.frames.send(Text(b"x" * 1_000_000))
            await here.frames.drain()

    filling = asyncio.create_task(fill())
    while here.frames._writable.is_set():
        await asyncio.sleep(0)
    there.frames.abort()
    with pytest.raises(Unavailable):
        await filling
