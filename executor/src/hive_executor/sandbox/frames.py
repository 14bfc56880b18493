"""What a runner and its parent say to each other: one msgpack message per frame, a 4-byte length in front."""

import os
import socket
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from hive_executor.sandbox.model import (
    HOST_ANSWER_BYTES_MAX,
    INPUT_BYTES_MAX,
    MEBIBYTE,
    PROGRAM_BYTES_MAX,
    Limits,
    LogLine,
)

HEADER_BYTES: Final = 4
STOP_BYTES: Final = 8
REQUEST_BYTES_MAX: Final = INPUT_BYTES_MAX + 2 * PROGRAM_BYTES_MAX + MEBIBYTE

Kind = Literal["python", "component", "command"]


class Load(msgspec.Struct, frozen=True, tag="load", array_like=True):
    """Load a compiled module and run it once for nothing, so that the first guest finds it warm."""

    kind: Kind
    path: str
    image_bytes: int


class Run(msgspec.Struct, frozen=True, tag="run", array_like=True):
    """Run a guest. `files` is None when the parent thinks that this runner still has the program.

    `number` grows from run to run. Written to the other pipe (`stop`) it ends this run and none that comes later.
    """

    kind: Kind
    path: str
    image_bytes: int
    digest: str
    entry: str
    files: dict[str, bytes] | None
    input: bytes
    limits: Limits
    number: int = 0


class Ready(msgspec.Struct, frozen=True, tag="ready", array_like=True):
    """The runner is confined, by these layers of `confine.LAYERS`, and waits for work."""

    pid: int
    layers: list[str] = []


class NeedFiles(msgspec.Struct, frozen=True, tag="need", array_like=True):
    """The runner no longer has the program; send `Run` again with its files."""


class Stale(msgspec.Struct, frozen=True, tag="stale", array_like=True):
    """The compiled module cannot be loaded here."""

    message: str


class Log(msgspec.Struct, frozen=True, tag="log", array_like=True):
    """Lines that a guest wrote, while it runs."""

    lines: list[LogLine]


class HostCall(msgspec.Struct, frozen=True, tag="call", array_like=True):
    """The guest asks for something beyond its sandbox, and waits. `request` is JSON text as the guest gave it."""

    capability: str
    operation: str
    request: str


class HostAnswer(msgspec.Struct, frozen=True, tag="answer", array_like=True):
    """What the guest gets: JSON text, or with `code` an error. With `ends` the attempt ends with that code.

    `stood_ms` of its time does not count: the guest waited for a person.
    """

    answer: str = ""
    code: str = ""
    message: str = ""
    ends: bool = False
    stood_ms: int = 0


class Done(msgspec.Struct, frozen=True, tag="done", array_like=True):
    """How the guest ended; all its log lines were sent before. `code` is empty when it succeeded."""

    code: str
    message: str
    detail: str
    output: bytes
    log_truncated: bool
    wall_us: int
    fuel_used: int
    memory_peak_bytes: int | None


Request = Load | Run
Reply = Ready | NeedFiles | Stale | Log | HostCall | Done

_encoder = msgspec.msgpack.Encoder()
_requests = msgspec.msgpack.Decoder(Request)
_answers = msgspec.msgpack.Decoder(HostAnswer)
_replies = msgspec.msgpack.Decoder(Reply)


class FrameTooLarge(Exception):
    """The peer announces more bytes than this conversation can need."""


def encode(message: Request | HostAnswer | Reply) -> bytearray:
    """Return a frame."""
    frame = bytearray(HEADER_BYTES)
    _encoder.encode_into(message, frame, HEADER_BYTES)
    frame[:HEADER_BYTES] = (len(frame) - HEADER_BYTES).to_bytes(HEADER_BYTES, "big")
    return frame


def receive_request(channel: socket.socket) -> Request | None:
    """Wait for the next request; None when the parent has gone."""
    body = _receive(channel, REQUEST_BYTES_MAX)
    return None if body is None else _requests.decode(body)


def receive_answer(channel: socket.socket) -> HostAnswer | None:
    """Wait for the answer to a host call; None when the parent has gone."""
    body = _receive(channel, HOST_ANSWER_BYTES_MAX + MEBIBYTE)
    return None if body is None else _answers.decode(body)


def _receive(channel: socket.socket, bytes_max: int) -> bytearray | None:
    header = _receive_exactly(channel, HEADER_BYTES)
    if header is None:
        return None
    length = int.from_bytes(header, "big")
    if length > bytes_max:
        raise FrameTooLarge(f"{length} bytes; expected {bytes_max} at most")
    return _receive_exactly(channel, length)


def _receive_exactly(channel: socket.socket, length: int) -> bytearray | None:
    buffer = bytearray(length)
    view = memoryview(buffer)
    got = 0
    while got < length:
        count = channel.recv_into(view[got:])
        if count == 0:
            return None
        got += count
    return buffer


def stop(number: int) -> bytes:
    """Return what ends the run `number`."""
    return number.to_bytes(STOP_BYTES, "big")


def receive_stops(pipe: int) -> int | None:
    """Return the newest run that is to end, of those that wait in `pipe`; None when the parent has gone."""
    # What is written in one piece comes out whole.
    stops = os.read(pipe, 64 * STOP_BYTES)
    return int.from_bytes(stops[-STOP_BYTES:], "big") if stops else None


class ReplyBuffer:
    """Collects bytes and gives back whole replies."""

    def __init__(self) -> None:
        self._pending = bytearray()
        self.bytes_max = MEBIBYTE

    def feed(self, data: bytes) -> Iterator[Reply]:
        """Add bytes as they came in.

        Raises:
            FrameTooLarge: a frame is longer than `bytes_max`.
            msgspec.MsgspecError: a frame is not a reply.
        """
        self._pending += data
        while len(self._pending) >= HEADER_BYTES:
            end = HEADER_BYTES + int.from_bytes(self._pending[:HEADER_BYTES], "big")
            if end - HEADER_BYTES > self.bytes_max:
                raise FrameTooLarge(f"a reply of {end - HEADER_BYTES} bytes")
            if len(self._pending) < end:
                return
            reply = _replies.decode(memoryview(self._pending)[HEADER_BYTES:end])
            del self._pending[:end]
            yield reply
