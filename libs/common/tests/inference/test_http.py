"""The HTTP/1.1 client of back ends: what may come over a socket, and what must not come of it."""

import asyncio
import contextlib
import datetime
import itertools
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from hive_common.inference import http1, http_pool
from hive_common.inference.backends import BackEnds
from hive_common.inference.calls import ModelCall
from hive_common.inference.config import BackEndConfig
from hive_common.inference.http1 import BUFFER_BYTES_MAX, HEAD_BYTES_MAX, Connection, Response
from hive_common.inference.http_pool import Pool
from hive_common.kernel.errors import InvalidArgument, Unavailable
from hive_common.ops.ports import free_port
from hive_common.ops.tls import server_context
from hypothesis import example, given
from hypothesis import strategies as st

READ_BYTES_MAX = 512 << 10
"""What one read of a connection may bring; over TLS more than without."""

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class RawServer:
    """Does with each connection what it is told; afterwards the connection is closed."""

    def __init__(self, handler: Handler, tls: ssl.SSLContext | None = None) -> None:
        self._handler = handler
        self._tls = tls
        self.connections = 0
        self.writers: list[asyncio.StreamWriter] = []
        self.ended: list[asyncio.Event] = []

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.writers.append(writer)
        ended = asyncio.Event()
        self.ended.append(ended)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await self._handler(reader, writer)
        finally:
            ended.set()
            writer.close()

    @contextlib.asynccontextmanager
    async def running(self, host: str = "127.0.0.1", ca_file: str = "") -> AsyncIterator[Pool]:
        """Serve, and yield a pool of connections to it."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._tls)
        scheme = "http" if self._tls is None else "https"
        pool = Pool(f"{scheme}://{host}:{server.sockets[0].getsockname()[1]}", ca_file=ca_file)
        try:
            yield pool
        finally:
            pool.close()
            for writer in self.writers:
                writer.transport.abort()
            server.close()
            async with asyncio.timeout(20):
                for ended in self.ended:
                    await ended.wait()


async def request_of(reader: asyncio.StreamReader) -> tuple[bytes, bytes]:
    """Return head and body of the next request."""
    head = await reader.readuntil(b"\r\n\r\n")
    size = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
    return head, await reader.readexactly(size)


def answering(*answers: bytes, close: bool = False) -> Handler:
    """Return a handler that gives one answer to each request of a connection."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for answer in answers:
            await request_of(reader)
            writer.write(answer)
        if not close:
            await reader.read()

    return handle


async def whole(response: Response) -> bytes:
    pieces = []
    while piece := await response.read():
        pieces.append(piece)
    return b"".join(pieces)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.001)


# Any cut


class Wire:
    """A transport that remembers what was done to it."""

    def __init__(self) -> None:
        self.closed = False

    def get_extra_info(self, name: str) -> None:
        return None

    def get_write_buffer_size(self) -> int:
        return 0

    def write(self, data: bytes) -> None:
        pass

    def is_closing(self) -> bool:
        return self.closed

    def abort(self) -> None:
        self.closed = True

    def pause_reading(self) -> None:
        pass

    resume_reading = pause_reading


class Fed:
    """A connection that is fed by hand, and its answer."""

    def __init__(self) -> None:
        self.wire = Wire()
        self.is_free = False
        self.connection = Connection("http://there", self._freed, lambda _: None)
        self.connection.connection_made(self.wire)  # type: ignore[arg-type]
        self.response = self.connection.send(b"")

    def _freed(self, _: Connection) -> None:
        self.is_free = True

    async def outcome(self) -> tuple[int, dict[str, str], bytes, bool] | str:
        try:
            await self.response.begun()
            body = await whole(self.response)
        except Unavailable as error:
            return error.message
        return self.response.status, self.response.headers, body, self.is_free

    def feed(self, data: bytes) -> None:
        if not self.wire.closed:
            self.connection.data_received(data)

    def close(self) -> None:
        self.wire.closed = True
        self.connection.connection_lost(None)


def chunked(pieces: list[bytes], extension: bytes = b"", trailer: bytes = b"") -> bytes:
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces if piece)
    return body + b"0\r\n" + trailer + b"\r\n"


trailers = st.sampled_from([b"", b"x-late: 1\r\n"])


@st.composite
def answers(draw: Any) -> tuple[bytes, tuple[int, dict[str, str], bytes, bool]]:
    """An answer as bytes, and what it means."""
    status = draw(st.sampled_from([200, 201, 299, 302, 404, 429, 500, 599]))
    pieces = draw(st.lists(st.binary(max_size=30), max_size=4))
    interim = draw(
        st.sampled_from([b"", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Hints\r\nlink: </x>\r\n\r\n" * 2])
    )
    headers = {"content-type": "text/event-stream; charset=utf-8", "x-empty": "", "x-two": "a, b"}
    told = b"Content-Type: text/event-stream; charset=utf-8\r\nX-Empty:\r\nx-two: a\r\nX-TWO:  b \r\n"
    body, keeps = b"".join(pieces), True
    match draw(st.sampled_from(["length", "chunked", "close"])):
        case "length":
            headers["content-length"] = str(len(body))
            told += b"Content-Length: %d\r\n" % len(body)
            sent = body
        case "chunked":
            headers["transfer-encoding"] = "chunked"
            told += b"Transfer-Encoding: chunked\r\n"
            sent = chunked(pieces, draw(st.sampled_from([b"", b";a=b", b';a="b c"'])), draw(trailers))
        case _:
            sent, keeps = body, False
    if keeps and draw(st.booleans()):
        headers["connection"], keeps = "close", False
        told += b"connection: close\r\n"
    return interim + b"HTTP/1.1 %d Any Reason\r\n%b\r\n%b" % (status, told, sent), (status, headers, body, keeps)


cuts = st.lists(st.integers(0, 400), max_size=12)


def cut(data: bytes, places: list[int]) -> list[bytes]:
    at = [0, *sorted(place for place in places if place < len(data)), len(data)]
    return [data[start:end] for start, end in itertools.pairwise(at) if start < end]


@given(answers(), cuts, st.booleans())
async def test_bytes_cut_anywhere_give_the_same_answer(
    answer: tuple[bytes, tuple[int, dict[str, str], bytes, bool]], places: list[int], one_by_one: bool
) -> None:
    data, meaning = answer
    fed = Fed()
    for piece in cut(data, list(range(len(data))) if one_by_one else places):
        fed.feed(piece)
    fed.close()
    assert await fed.outcome() == meaning


@given(answers(), cuts, st.integers(0, 400))
async def test_an_answer_that_ends_before_its_end_is_none(
    answer: tuple[bytes, tuple[int, dict[str, str], bytes, bool]], places: list[int], size: int
) -> None:
    data, (_, headers, _, _) = answer
    fed = Fed()
    head = data.index(b"Any Reason") + data[data.index(b"Any Reason") :].index(b"\r\n\r\n") + 4
    told_by_close = not headers.keys() & {"content-length", "transfer-encoding"}
    kept = data[: min(size, head - 1 if told_by_close else len(data) - 1)]
    for piece in cut(kept, places):
        fed.feed(piece)
    fed.close()
    outcome = await fed.outcome()
    assert isinstance(outcome, str) and outcome.startswith("http://there: ")


@given(
    st.binary(max_size=300) | answers().map(lambda one: one[0]),
    st.lists(st.tuples(st.integers(0, 400), st.binary(max_size=3)), max_size=4),
    cuts,
)
@example(OK, [(0, b"\x00")], [])
@example(b"\xff" * 300, [], [3])
async def test_whatever_comes_is_an_answer_or_an_error_that_names_the_url(
    data: bytes, changes: list[tuple[int, bytes]], places: list[int]
) -> None:
    changed = bytearray(data)
    for place, new in changes:
        changed[place : place + len(new)] = new
    fed = Fed()
    for piece in cut(bytes(changed), places):
        fed.feed(piece)
    fed.close()
    outcome = await fed.outcome()
    assert outcome[0] in range(200, 1000) if isinstance(outcome, tuple) else outcome.startswith("http://there: ")


async def test_an_answer_byte_by_byte_over_a_socket() -> None:
    data = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + chunked([b"one", b"two" * 100])

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        for at in range(len(data)):
            writer.write(data[at : at + 1])
            await asyncio.sleep(0)
        await reader.read()

    async with RawServer(handle).running() as pool:
        assert await whole(await pool.request("GET", "/")) == b"one" + b"two" * 100


# Malformed


def head(*lines: bytes) -> bytes:
    return b"HTTP/1.1 200 OK\r\n" + b"".join(line + b"\r\n" for line in lines) + b"\r\n"


CHUNKS = head(b"transfer-encoding: chunked")
MALFORMED = {
    "no HTTP": b"SSH-2.0-OpenSSH_9.2\r\n",
    "HTTP/2": b"\x00\x00\x12\x04\x00\x00\x00\x00\x00",
    "no status": b"HTTP/1.1 OK\r\n\r\n",
    "status below 100": b"HTTP/1.1 099 Odd\r\n\r\n",
    "a length that is none": head(b"content-length: two") + b"ok",
    "two lengths": head(b"content-length: 2", b"content-length: 3") + b"ok",
    "length and chunks": head(b"content-length: 2", b"transfer-encoding: chunked") + chunked([b"ok"]),
    "a chunk whose size is none": CHUNKS + b"xyz\r\nok\r\n",
    "a chunk that is longer than its size": CHUNKS + b"1\r\nok\r\n0\r\n\r\n",
    "another coding for transfer": head(b"transfer-encoding: gzip, chunked") + chunked([b"ok"]),
    "lines without return": b"HTTP/1.1 200 OK\ncontent-length: 2\n\nok",
    "a folded line": head(b"x-one: 1", b" folded", b"content-length: 2") + b"ok",
    "a name with a space": head(b"x one: 1", b"content-length: 2") + b"ok",
    "another protocol": b"HTTP/1.1 101 Switching\r\nupgrade: websocket\r\nconnection: upgrade\r\n\r\n\x81\x00",
    "a large head": head(*[b"x-%d: %b" % (at, b"y" * 1000) for at in range(80)], b"content-length: 2") + b"ok",
    "a head without end": b"HTTP/1.1 200 OK\r\nx-long: " + b"y" * (HEAD_BYTES_MAX + READ_BYTES_MAX),
    "interim answers without end": b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000,
    "an extension without end": CHUNKS + b"1;" + b"y" * (HEAD_BYTES_MAX + READ_BYTES_MAX),
    "trailers without end": CHUNKS + b"0\r\n" + b"x-late: yyyyyyyyyyyyyy\r\n" * 20_000,
}  # fmt: skip


@pytest.mark.parametrize("what", MALFORMED)
async def test_what_is_malformed_is_an_error_that_names_the_url_and_ends_the_connection(what: str) -> None:
    server = RawServer(answering(MALFORMED[what]))
    async with server.running() as pool:
        with pytest.raises(Unavailable) as raised:
            await whole(await pool.request("GET", "/"))
        assert raised.value.message.startswith(f"{pool.url}: ")
        # It waits for the end of its connection.
        await until(server.ended[0].is_set)
    assert server.connections == 1


@pytest.mark.parametrize("status", [204, 304])
async def test_an_answer_that_has_no_body_waits_for_none(status: int) -> None:
    answer = b"HTTP/1.1 %d No Body\r\ncontent-length: 5\r\n\r\n" % status
    if status == 204:
        answer = b"HTTP/1.1 204 No Content\r\n\r\n"
    server = RawServer(answering(answer, OK))
    async with server.running() as pool:
        response = await pool.request("GET", "/")
        assert (response.status, await whole(response)) == (status, b"")
        assert await whole(await pool.request("GET", "/")) == b"ok"
    assert server.connections == 1


async def test_a_coded_body_says_so() -> None:
    coded = head(b"content-encoding: GZIP", b"content-length: 2") + b"\x1f\x8b"
    async with RawServer(
        answering(coded, head(b"content-encoding: identity", b"content-length: 0"))
    ).running() as pool:
        codings = []
        for _ in range(2):
            response = await pool.request("GET", "/")
            await whole(response)
            codings.append(response.coding)
    assert codings == ["gzip", ""]


# The request


async def test_a_request_goes_out_as_it_was_asked_for() -> None:
    seen: list[tuple[bytes, bytes]] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        seen.append(await request_of(reader))
        writer.write(OK)

    async with RawServer(handle).running() as pool:
        below = Pool(f"{pool.url}/böse base", {"authorization": "Bearer key"})
        await whole(await below.request("POST", "/v1/x?y=%20", b'{"a": 1}', {"x-hive-pin": "region:köln"}))
        below.close()
    ((first, body),) = seen
    assert first.split(b"\r\n") == [
        b"POST /b%C3%B6se%20base/v1/x?y=%20 HTTP/1.1",
        b"host: " + pool.url.removeprefix("http://").encode(),
        b"accept-encoding: identity",
        b"user-agent: hive",
        b"authorization: Bearer key",
        "x-hive-pin: region:köln".encode(),
        b"content-length: 8",
        b"",
        b"",
    ]
    assert body == b'{"a": 1}'


async def test_a_header_cannot_begin_another_line() -> None:
    async with RawServer(answering()).running() as pool:
        with pytest.raises(InvalidArgument, match="x-hive-pin"):
            await pool.request("GET", "/", headers={"x-hive-pin": "any\r\nx-injected: 1"})


@pytest.mark.parametrize(
    "url", ["127.0.0.1:11434", "ftp://host", "http://", "http://host:port", "http://host/?q", "http://[::1", "http://a..b"]
)  # fmt: skip
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InvalidArgument, match="base URL"):
        Pool(url)


def test_a_url_with_a_key_is_refused_without_showing_it() -> None:
    with pytest.raises(InvalidArgument, match="key_file") as raised:
        Pool("https://me:hidden@host")
    assert "hidden" not in raised.value.message


# Connections


async def test_connections_are_used_again_and_there_are_as_many_as_are_needed() -> None:
    server = RawServer(answering(*[OK] * 10))
    async with server.running() as pool:
        for _ in range(3):
            await asyncio.gather(*(_ok(pool) for _ in range(4)))
        for connection in pool._all:
            assert connection._transport is not None
            made = connection._transport.get_extra_info("socket")
            assert made.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    assert server.connections == 4


async def _ok(pool: Pool) -> None:
    assert await whole(await pool.request("GET", "/")) == b"ok"


async def test_a_connection_that_the_server_closed_when_it_was_used_again_is_replaced_once() -> None:
    bodies: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        bodies.append((await request_of(reader))[1])
        writer.write(OK)
        bodies.append((await request_of(reader))[1])
        # Closed when the second request is there, without a byte of an answer.
        writer.transport.abort()

    server = RawServer(handle)
    async with server.running() as pool:
        for number in range(3):
            assert await whole(await pool.request("POST", "/", b"%d" % number, repeats=True)) == b"ok"
    assert bodies == [b"0", b"1", b"1", b"2", b"2"]
    assert server.connections == 3


@pytest.mark.parametrize("reads", [True, False])
async def test_a_request_that_may_cost_something_is_sent_once(reads: bool) -> None:
    requests = 0

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal requests
        for number in range(2):
            # One that was not read may have been read all the same, for what its sender knows.
            if not await (request_of(reader) if reads or not number else reader.read(1)):
                return
            requests += 1
            if not number:
                writer.write(OK)
        writer.transport.abort()

    server = RawServer(handle)
    async with server.running() as pool:
        assert await whole(await pool.request("POST", "/", b"{}")) == b"ok"
        with pytest.raises(Unavailable, match="the connection was closed") as failed:
            await pool.request("POST", "/", b"{}")
        assert failed.value.fields.get("reached") is not False
        assert await whole(await pool.request("POST", "/", b"{}")) == b"ok"
    assert (requests, server.connections) == (3, 2)


class BlockingServer:
    """A server of a thread: it does things while the loop of the client stands still."""

    def __init__(self, *behind: bytes) -> None:
        self._behind = behind
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(20)
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests = 0
        self._answered = threading.Semaphore(0)
        self._go = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        for behind in self._behind:
            taken, _ = self._listener.accept()
            with taken:
                taken.settimeout(20)
                taken.recv(65_536)
                self.requests += 1
                taken.sendall(OK)
                self._go.acquire(timeout=20)
                taken.sendall(behind)
                taken.shutdown(socket.SHUT_WR)
            self._answered.release()
        self._listener.close()

    def close_connection(self) -> None:
        """Close the connection that was used last, and return when that is done."""
        self._go.release()
        assert self._answered.acquire(timeout=20)

    def join(self) -> None:
        self._thread.join(20)


@pytest.mark.parametrize("behind", [b"", b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n"])
async def test_a_connection_that_was_closed_before_the_loop_could_notice_is_not_written_to(behind: bytes) -> None:
    server = BlockingServer(behind, behind, behind)
    pool = Pool(server.url)
    try:
        for _ in range(3):
            assert await whole(await pool.request("POST", "/", b"{}")) == b"ok"
            assert all(one.is_open for one in pool._idle)
            # From here to the next request the loop does not run.
            server.close_connection()
    finally:
        pool.close()
        server.join()
    assert server.requests == 3


@pytest.mark.parametrize(
    "begun", [b"H", b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nx"]
)
async def test_what_had_begun_to_be_answered_is_not_asked_again(begun: bytes) -> None:
    server = RawServer(answering(OK, begun, close=True))
    async with server.running() as pool:
        await _ok(pool)
        with pytest.raises(Unavailable, match="closed"):
            await whole(await pool.request("GET", "/"))
    assert server.connections == 1


async def test_a_new_connection_that_is_closed_is_not_tried_again() -> None:
    server = RawServer(answering(b"", close=True))
    async with server.running() as pool:
        with pytest.raises(Unavailable, match="the connection was closed"):
            await pool.request("GET", "/")
    assert server.connections == 1


async def test_a_connection_that_was_closed_while_idle_is_not_used() -> None:
    server = RawServer(answering(OK, close=True))
    async with server.running() as pool:
        await _ok(pool)
        await until(lambda: not pool._idle)
        await _ok(pool)
    assert server.connections == 2


@pytest.mark.parametrize("more", [b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nwrong", b"HTTP/1.1 2", b"garbage"])
async def test_what_comes_behind_an_answer_is_no_answer_to_what_is_asked_next(more: bytes) -> None:
    server = RawServer(answering(OK + more, OK))
    async with server.running() as pool:
        await _ok(pool)
        await _ok(pool)
    assert server.connections == 2


async def test_what_comes_unasked_ends_an_idle_connection() -> None:
    server = RawServer(answering(OK))
    async with server.running() as pool:
        await _ok(pool)
        server.writers[0].write(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
        await until(server.ended[0].is_set)
        await _ok(pool)
    assert server.connections == 2


async def test_an_idle_connection_is_closed_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_pool, "IDLE_S", 0.02)
    server = RawServer(answering(OK))
    async with server.running() as pool:
        await asyncio.gather(_ok(pool), _ok(pool))
        for ended in server.ended:
            await until(ended.is_set)
        await until(lambda: not pool._all)
        assert not pool._idle and pool._sweeping is None


async def test_an_answer_before_the_request_was_read_is_taken_and_the_connection_is_not_used_again() -> None:
    go = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 2\r\n\r\nno")
        await go.wait()

    server = RawServer(handle)
    async with server.running() as pool:
        response = await pool.request("POST", "/", bytes(32 << 20))
        assert (response.status, await whole(response)) == (413, b"no")
        assert not pool._idle
        go.set()


async def test_closing_the_pool_ends_what_is_on_its_way() -> None:
    server = RawServer(answering(head(b"content-length: 9") + b"x"))
    async with server.running() as pool:
        response = await pool.request("GET", "/")
        assert await response.read() == b"x"
        reading = asyncio.create_task(response.read())
        begun = asyncio.create_task(pool.request("GET", "/"))
        await until(lambda: server.connections == 2)
        await asyncio.sleep(0)
        pool.close()
        for task in (reading, begun):
            await asyncio.wait({task})
        with pytest.raises(Unavailable, match="closed here"):
            await reading
        begun.exception()
        with pytest.raises(Unavailable, match="closed here"):
            await pool.request("GET", "/")


@pytest.mark.parametrize("answer", [b"", head(b"transfer-encoding: chunked") + b"2\r\nok\r\n"])
async def test_who_lets_go_of_an_answer_closes_the_connection(answer: bytes) -> None:
    server = RawServer(answering(answer))
    async with server.running() as pool:
        asking = asyncio.create_task(pool.request("GET", "/"))
        await until(lambda: server.connections == 1 and (not answer or asking.done()))
        if answer:
            (await asking).close()
        else:
            asking.cancel()
        await until(server.ended[0].is_set)
        await asyncio.wait({asking})
        assert not pool._all


async def test_a_server_that_is_not_there_cannot_be_reached() -> None:
    pool = Pool(f"http://127.0.0.1:{free_port()}")
    with pytest.raises(Unavailable, match=f"{pool.url}: cannot be reached: "):
        await pool.request("GET", "/")


async def test_an_error_says_whether_the_request_can_have_come_there() -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(OK)
        await request_of(reader)
        # The second one has come; there is nobody to whom it could be sent again.
        server.close()
        writer.transport.abort()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    pool = Pool(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        await _ok(pool)
        for reached in (True, False):
            with pytest.raises(Unavailable, match="cannot be reached: ") as failed:
                await pool.request("POST", "/", b"{}", repeats=True)
            assert failed.value.fields["reached"] is reached
    finally:
        pool.close()
        server.close()


async def test_a_name_that_is_not_known_cannot_be_reached() -> None:
    with pytest.raises(Unavailable, match="cannot be reached: "):
        await Pool("http://nowhere.invalid").request("GET", "/")


@pytest.mark.parametrize("is_patient", [True, False])
async def test_the_end_of_a_body_that_nobody_waits_for_gives_the_connection_back_if_it_comes_soon(
    monkeypatch: pytest.MonkeyPatch, is_patient: bool
) -> None:
    monkeypatch.setattr(http1, "LEAVE_S", 600.0 if is_patient else 0.01)
    left = asyncio.Event()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(CHUNKS + b"6\r\n[DONE]\r\n")
        await left.wait()
        if is_patient:
            writer.write(chunked([]))
            await request_of(reader)
            writer.write(OK)
        await reader.read()

    server = RawServer(handle)
    async with server.running() as pool:
        response = await pool.request("GET", "/")
        assert await response.read() == b"[DONE]"
        response.leave()
        left.set()
        if is_patient:
            await until(lambda: bool(pool._idle))
            await _ok(pool)
        else:
            await until(server.ended[0].is_set)
            await until(lambda: not pool._all)
    assert server.connections == 1


# Bodies


@pytest.mark.parametrize("by_tls", [False, True])
async def test_who_reads_slowly_holds_little(certificate: Path, by_tls: bool) -> None:
    size, piece = 16 << 20, bytes(1 << 20)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await request_of(reader)
        writer.write(head(b"content-length: %d" % size))
        for _ in range(size // len(piece)):
            writer.write(piece)
            await writer.drain()
        await reader.read()

    server = RawServer(handle, server_context(certificate, certificate) if by_tls else None)
    async with server.running("localhost", str(certificate)) as pool:
        response = await pool.request("GET", "/")
        (connection,) = pool._all
        got = 0

        def holds_all_that_may_come() -> bool:
            return connection._is_paused or got + response._size == size

        while got < size:
            await until(holds_all_that_may_come)
            assert response._size <= BUFFER_BYTES_MAX + READ_BYTES_MAX
            got += len(await response.read())
        assert await response.read() == b"" and got == size
        assert pool._idle


async def test_who_waits_for_a_body_waits_no_longer_than_it_wants_to() -> None:
    async with RawServer(answering(head(b"content-length: 9") + b"half")).running() as pool:
        response = await pool.request("GET", "/")
        now_s = asyncio.get_running_loop().time()
        assert await response.read(now_s) == b"half"
        with pytest.raises(TimeoutError):
            await response.read(now_s + 0.01)
        # Nothing is lost by it.
        assert not pool._idle and pool._all
        response.close()


@pytest.mark.parametrize("framing", [b"content-length: 9", b"transfer-encoding: chunked"])
async def test_a_body_that_breaks_off_is_given_as_far_as_it_came(framing: bytes) -> None:
    body = b"half" if framing.startswith(b"c") else b"4\r\nhalf\r\n"
    async with RawServer(answering(head(framing) + body, close=True)).running() as pool:
        response = await pool.request("GET", "/")
        assert await response.read() == b"half"
        with pytest.raises(Unavailable, match=f"{pool.url}: the answer broke off: the connection was closed"):
            await response.read()


async def test_a_body_that_ends_with_the_connection_is_whole_then() -> None:
    server = RawServer(answering(head(b"content-type: text/plain") + b"all of it", close=True))
    async with server.running() as pool:
        assert await whole(await pool.request("GET", "/")) == b"all of it"
        assert not pool._idle


# TLS


@pytest.fixture
def certificate(tmp_path: Path) -> Path:
    """Certificate and key of `localhost`, in one file."""
    return _certificate(tmp_path / "localhost.pem", "localhost")


def _certificate(file: Path, name: str) -> Path:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file.write_bytes(made.public_bytes(serialization.Encoding.PEM) + private)
    return file


@pytest.mark.parametrize("by_system", [True, False])
async def test_over_tls_the_server_is_told_the_name_and_has_to_prove_it(
    certificate: Path, monkeypatch: pytest.MonkeyPatch, by_system: bool
) -> None:
    context = server_context(certificate, certificate)
    context.set_alpn_protocols(["h2", "http/1.1"])
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)
    if by_system:
        # Where OpenSSL looks for whom the system trusts.
        monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    server = RawServer(answering(OK, OK), context)
    async with server.running("localhost", "" if by_system else str(certificate)) as pool:
        await _ok(pool)
        await _ok(pool)
        made = server.writers[0].get_extra_info("ssl_object")
        assert (names, made.selected_alpn_protocol()) == (["localhost"], "http/1.1")
    assert server.connections == 1


async def test_a_back_end_over_https_is_shown_its_key_and_nobody_else_is(certificate: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text("secret")
    key_file.chmod(0o600)
    seen: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while True:
            asked, _ = await request_of(reader)
            seen.append(asked)
            body = b'{"data": [{"id": "m"}]}' if b"GET /v1/models " in asked else b'{"choices": []}'
            writer.write(head(b"content-type: application/json", b"content-length: %d" % len(body)) + body)

    wrong = _certificate(tmp_path / "wrong.pem", "elsewhere")
    for shown, models in ((certificate, ["m"]), (wrong, [])):
        seen.clear()
        async with RawServer(handle, server_context(shown, shown)).running("localhost", str(shown)) as pool:
            config = BackEndConfig(f"{pool.url}/v1", str(key_file), str(shown))
            async with BackEnds([config]) as back_ends:
                assert [model.name for model in back_ends.found] == models
                for model in models:
                    call = ModelCall(
                        id="x",
                        endpoint="chat",
                        model=model,
                        body=b'{"model": "m"}',
                        stream=False,
                        deadline_ms=20_000,
                    )
                    answer = await back_ends.complete(call)
                    assert [piece async for piece in answer.chunks] == [b'{"choices": []}']
        assert all(b"authorization: Bearer secret\r\n" in asked for asked in seen)
        assert bool(seen) == bool(models)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
async def test_who_cannot_prove_the_name_gets_no_request(certificate: Path, tmp_path: Path, host: str) -> None:
    requests: list[bytes] = []

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        requests.append(await reader.read())

    # By another address the certificate is not its own; under the name it is not signed by whom is trusted.
    trusted = certificate if host == "127.0.0.1" else _certificate(tmp_path / "other.pem", "localhost")
    async with RawServer(handle, server_context(certificate, certificate)).running(host, str(trusted)) as pool:
        with pytest.raises(Unavailable, match="cannot be reached: its certificate is not trusted: "):
            await pool.request("GET", "/", headers={"authorization": "Bearer secret"})
    assert not any(requests)


async def test_a_server_without_tls_is_not_asked_where_tls_is_expected(certificate: Path) -> None:
    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1)
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with RawServer(handle).running("localhost") as plain:
        with pytest.raises(Unavailable, match=r"cannot be reached: .*SSL"):
            await Pool(plain.url.replace("http:", "https:"), ca_file=str(certificate)).request("GET", "/")


async def test_a_connection_that_takes_too_long_is_given_up(
    certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http_pool, "CONNECT_TLS_S", 0.05)

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()

    async with RawServer(silent).running("localhost") as plain:
        with pytest.raises(Unavailable, match=r"cannot be reached: no connection within 0\.05 s"):
            await Pool(plain.url.replace("http:", "https:"), ca_file=str(certificate)).request("GET", "/")


def test_a_file_of_a_ca_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"ca\.pem"):
        Pool("https://localhost", ca_file=str(tmp_path / "ca.pem"))
