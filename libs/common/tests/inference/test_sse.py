"""Events are cut alike however the bytes arrive."""

import re

import pytest
from hive_common.inference.sse import DONE, Events, data_of, is_done
from hive_common.kernel.errors import PayloadTooLarge
from hypothesis import given
from hypothesis import strategies as st

ENDS = st.sampled_from([b"\n", b"\r\n", b"\r"])
FIELDS = st.sampled_from([b"data: {}", b"data:[DONE]", b": alive", b"data: \xf0\x9f\x90\x9d", b"event: x", b"id"])


@st.composite
def streams(draw: st.DrawFn) -> tuple[list[bytes], bytes]:
    events = []
    for lines in draw(st.lists(st.lists(st.tuples(FIELDS, ENDS), min_size=1, max_size=3), max_size=5)):
        last = draw(ENDS)
        # LF after CR is one end of a line, not two.
        if lines[-1][1] == b"\r" and last.startswith(b"\n"):
            last = b"\r"
        events.append(b"".join(field + end for field, end in lines) + last)
    return events, draw(st.sampled_from([b"data: cut off", b": cut\n"]))


def cut(stream: bytes, borders: list[int]) -> tuple[list[bytes], bytes]:
    cutter = Events()
    places = sorted({border % (len(stream) + 1) for border in borders})
    pieces = [stream[a:b] for a, b in zip([0, *places], [*places, len(stream)], strict=True)]
    return [event for piece in pieces for event in cutter.feed(piece)], cutter.rest


@given(streams(), st.lists(st.integers(min_value=0)))
def test_events_are_cut_at_blank_lines_wherever_the_chunks_end(
    stream: tuple[list[bytes], bytes], borders: list[int]
) -> None:
    events, rest = stream
    assert cut(b"".join(events) + rest, borders) == (events, rest)


@given(st.binary(), st.lists(st.integers(min_value=0)))
def test_no_byte_is_lost_or_doubled(stream: bytes, borders: list[int]) -> None:
    events, rest = cut(stream, borders)
    assert b"".join(events) + rest == stream
    assert (events, rest) == cut(stream, [])


@given(st.lists(FIELDS, min_size=1), ENDS)
def test_data_is_what_the_standard_says(lines: list[bytes], end: bytes) -> None:
    event = end.join(lines) + end + end
    values = [re.sub(rb"^data: ?", b"", line) for line in lines if line.startswith(b"data")]
    assert data_of(event) == (b"\n".join(values) if values else None)


def test_an_event_has_a_largest_size() -> None:
    cutter = Events(bytes_max=100)
    assert cutter.feed(b"data: x\n\n" * 100) == [b"data: x\n\n"] * 100
    with pytest.raises(PayloadTooLarge):
        cutter.feed(b"x" * 101)


def test_the_end_is_told_from_a_text_about_it() -> None:
    assert is_done(DONE) and is_done(b"data:[DONE]\r\n\r\n")
    assert not is_done(b'data: {"content":"[DONE]"}\n\n')
