"""Answers in numbered chunks arrive whole and in order, or end in an error."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple

import msgspec
import pytest
from hive_common.contracts.messages import InferRequest, StreamChunk
from hive_common.inference import chunks as chunks_module
from hive_common.inference.calls import Answer, Head
from hive_common.inference.chunks import Receiver, Sender
from hive_common.inference.parts import PART_BYTES_MAX, Assembly, parts_of
from hive_common.inference.sse import DONE
from hive_common.kernel.errors import InvalidArgument, NotFound, PayloadTooLarge, Unavailable
from hypothesis import given
from hypothesis import strategies as st

SSE = Head(200, "text/event-stream")
EVENTS = [b"data: %d\n\n" % number for number in range(200)]


class Given(NamedTuple):
    head: Head
    chunks: AsyncGenerator[bytes, None]


class Line:
    """A sender and a receiver with a wire between them that loses what it is told to."""

    def __init__(
        self, source: Callable[[], AsyncGenerator[bytes, None]], *, credit: int = 8, stream: bool = True
    ) -> None:
        self.sent: list[StreamChunk] = []
        self.lost: set[int] = set()
        self.credits: list[int] = []
        self.closed: list[bool] = []
        self.has_ended = False
        self.source = source
        self.sender = Sender(self._publish, credit)
        self.receiver = Receiver(
            "device", is_stream=stream, first_s=20, grant=self._grant, close=self._close, credit=credit
        )
        self.sending = asyncio.create_task(self.sender.run(self._begin, is_stream=stream))

    async def _begin(self) -> Answer:
        return Given(SSE, self.source())

    async def _publish(self, data: bytes) -> None:
        chunk = msgspec.json.decode(data, type=StreamChunk)
        self.sent.append(chunk)
        if chunk.sequence not in self.lost:
            self.receiver.receive(chunk)

    async def _grant(self, credit: int) -> None:
        self.credits.append(credit)
        self.sender.grant(credit)

    async def _close(self, still_sends: bool) -> None:
        self.closed.append(still_sends)
        self.sending.cancel()


def source(items: list[bytes], error: Exception | None = None) -> Callable[[], AsyncGenerator[bytes, None]]:
    async def generate() -> AsyncGenerator[bytes, None]:
        for item in items:
            yield item
        if error is not None:
            raise error

    return generate


async def read(line: Line) -> bytes:
    assert await line.receiver.begun() == SSE
    return b"".join([chunk async for chunk in line.receiver])


@pytest.mark.parametrize("credit", [1, 2, 8, 1000])
async def test_a_stream_arrives_whole_whatever_the_credit(credit: int) -> None:
    line = Line(source([*EVENTS, DONE]), credit=credit)
    assert await read(line) == b"".join(EVENTS) + DONE
    assert [chunk.sequence for chunk in line.sent] == list(range(len(line.sent)))
    assert line.sent[0].status == 200 and line.sent[0].data and line.sent[-1].end
    assert line.closed == [False]


async def test_a_sender_is_never_further_ahead_than_its_credit() -> None:
    line = Line(source([*EVENTS, DONE]), credit=8)
    await line.receiver.begun()
    for _ in range(100):
        await asyncio.sleep(0)
    assert len(line.sent) == 8
    await line.receiver.aclose()
    assert line.closed == [True]


async def test_an_answer_that_is_no_stream_is_cut_into_messages() -> None:
    body = b'{"a":"' + "é".encode() * PART_BYTES_MAX + b'"}'
    line = Line(source([body[:7], body[7:]]), stream=False)
    assert await read(line) == body
    assert len(line.sent) == 3
    assert all(len(msgspec.json.encode(chunk)) < 1 << 20 for chunk in line.sent)


async def test_an_event_that_is_too_long_for_a_message_arrives_in_one_piece() -> None:
    event = b'data: "' + b'x"' * PART_BYTES_MAX + b'"\n\n'
    line = Line(source([event, DONE]))
    await line.receiver.begun()
    pieces = [piece async for piece in line.receiver]
    assert b"".join(pieces) == event + DONE and all(piece.endswith(b"\n\n") for piece in pieces)


async def test_a_gap_ends_the_stream_in_an_error_event_and_tells_the_sender() -> None:
    line = Line(source([*EVENTS, DONE]), credit=1000)
    line.lost = {5}
    stream = await read(line)
    assert stream.startswith(b"".join(EVENTS[:5])) and EVENTS[5] not in stream
    assert b"piece 5 of the answer was lost" in stream and DONE not in stream
    assert line.closed == [True]


async def test_silence_ends_the_stream_in_an_error_event(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "SILENCE_S", 0.05)

    async def hanging() -> AsyncGenerator[bytes, None]:
        yield EVENTS[0]
        await asyncio.Event().wait()

    line = Line(hanging)
    assert b"has said nothing" in await read(line)
    assert line.closed == [True]


async def test_a_sender_with_nothing_to_say_keeps_the_stream_alive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "KEEP_ALIVE_S", 0.01)
    go_on = asyncio.Event()

    async def slow() -> AsyncGenerator[bytes, None]:
        yield EVENTS[0]
        await go_on.wait()
        yield DONE

    line = Line(slow, credit=4)
    await line.receiver.begun()
    assert await anext(line.receiver) == EVENTS[0]
    reading = asyncio.create_task(anext(line.receiver))
    while len(line.sent) < 10:
        await asyncio.sleep(0.01)
    go_on.set()
    assert await reading == DONE
    assert [chunk.data for chunk in line.sent[1:9]] == [""] * 8


async def test_an_error_before_the_answer_is_raised_and_after_it_is_the_last_event() -> None:
    line = Line(source([], NotFound("no such model", nearest=("other",))))
    with pytest.raises(NotFound) as raised:
        await line.receiver.begun()
    assert raised.value.fields["nearest"] == ["other"]
    line = Line(source(EVENTS[:2], Unavailable("it broke")))
    stream = await read(line)
    assert stream.startswith(b"".join(EVENTS[:2])) and b"it broke" in stream
    line = Line(source([b"{"], Unavailable("it broke")), stream=False)
    with pytest.raises(Unavailable, match="it broke"):
        await line.receiver.begun()


async def test_a_sender_that_floods_is_not_heard_any_more() -> None:
    receiver = Line(source([]), credit=2).receiver
    for sequence in range(4):
        receiver.receive(StreamChunk(sequence=sequence, data="data: x\n\n", status=200))
    assert b"more than it was asked for" in b"".join([piece async for piece in receiver])


async def test_a_reader_that_has_gone_without_a_word_ends_the_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks_module, "CREDIT_S_MAX", 0.05)
    closed = asyncio.Event()

    async def endless() -> AsyncGenerator[bytes, None]:
        try:
            while True:
                yield EVENTS[0]
        finally:
            closed.set()

    line = Line(endless)
    assert await line.sending == "unavailable"
    assert closed.is_set()


@given(st.text(), st.integers(min_value=4, max_value=9))
def test_parts_make_the_body_again(text: str, size: int) -> None:
    parts = parts_of(text.encode(), size)
    assert all(len(part.encode()) <= size for part in parts)
    assert "".join(parts) == text


def test_a_body_is_assembled_from_its_parts_in_order_only() -> None:
    def part(number: int, of: int, text: str) -> InferRequest:
        return InferRequest(op="call", call="x", body=text, part=number, parts=of)

    assembly = Assembly()
    assert assembly.add(part(0, 2, "{")) is None
    assert assembly.add(part(1, 2, "}")) == b"{}"
    for wrong in (part(1, 2, ""), part(0, 0, ""), part(-1, 1, ""), part(0, 1_000_000, "")):
        with pytest.raises(InvalidArgument):
            Assembly().add(wrong)
    assembly = Assembly()
    with pytest.raises(PayloadTooLarge):
        for number in range(30):
            assembly.add(part(number, 30, "x" * PART_BYTES_MAX))
