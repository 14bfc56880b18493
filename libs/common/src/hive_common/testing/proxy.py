"""A TCP proxy that does to a connection what networks do: delays, silence, and cuts at the worst moment.

async with TcpProxy(port) as proxy:
    cut = proxy.cut_next_answer(until=POSTGRES_READY)
    ...                      # the next request reaches the server, its answer is swallowed
    await cut.wait()
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

CHUNK_BYTES = 65_536
POSTGRES_READY = b"Z\x00\x00\x00\x05I"
"""ReadyForQuery, idle: the server has committed what it was sent (PostgreSQL protocol, section 54.7)."""

Whole = Callable[[bytes], bool]
"""Says whether the bytes of an answer that have come hold all of it; see `hive_common.testing.wire`."""


@dataclass(eq=False)
class _Loss:
    """An answer that is to be lost."""

    whole: Whole
    and_cut: bool
    skip: int
    spared_bytes: int = 0
    happened: asyncio.Event = field(default_factory=asyncio.Event)


@dataclass(eq=False)
class _Link:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    loss: "_Loss | None" = None
    swallowed: bytearray = field(default_factory=bytearray)

    def close(self) -> None:
        for writer in (self.client, self.server):
            # No lingering goodbye: the peer is to see a broken connection.
            writer.transport.abort()


class TcpProxy:
    """Forwards connections from a free loopback port to 127.0.0.1:`target_port`.

    Attributes:
        port: where clients connect.
        delay_s: how long every chunk waits, in each direction.
        connections: how many were accepted so far.
        held: how many chunks had to wait for `resume` so far.
        change: makes what the server is told from what a client says, chunk by chunk; None leaves it as it is.
    """

    def __init__(self, target_port: int, *, target_host: str = "127.0.0.1") -> None:
        self.port = 0
        self.delay_s = 0.0
        self.connections = 0
        self.held = 0
        self.change: Callable[[bytes], bytes] | None = None
        self._target = (target_host, target_port)
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._refusing = False
        self._loss: _Loss | None = None
        self._request_cut: asyncio.Event | None = None

    async def __aenter__(self) -> "TcpProxy":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        self.cut_all()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def cut_next_answer(self, until: bytes | Whole = b"", *, skip: int = 0) -> asyncio.Event:
        """Forward the next request, swallow its answer to its end, then cut that connection.

        Args:
            until: what stands at the end of the answer, or what says so of its bytes.
            skip: so many requests, as they come in one piece each, are let through before.

        Returns an event that is set when it happened. By then the server has done what it was asked.
        """
        return self._lose(until, and_cut=True, skip=skip)

    def cut_inside_next_answer(self, after_bytes: int) -> asyncio.Event:
        """Forward the next request and the first bytes of its answer, then cut that connection."""
        happened = self._lose(b"", and_cut=True, skip=0)
        assert self._loss is not None
        self._loss.spared_bytes = after_bytes
        return happened

    def silence_next_answer(self, until: bytes | Whole = b"", *, skip: int = 0) -> asyncio.Event:
        """Like `cut_next_answer`, but the connection stays, and says nothing more: the caller's time runs out."""
        return self._lose(until, and_cut=False, skip=skip)

    def spare_answers(self) -> None:
        """Take back losses that have not happened yet, of answers or of a request."""
        self._loss = None
        self._request_cut = None
        for link in self._links:
            if link.loss is not None and not link.loss.happened.is_set():
                link.client.write(bytes(link.swallowed))
                link.swallowed.clear()
                link.loss = None

    def _lose(self, until: bytes | Whole, and_cut: bool, skip: int) -> asyncio.Event:
        whole = until if callable(until) else lambda answer: until in answer
        self._loss = _Loss(whole, and_cut, skip)
        return self._loss.happened

    def cut_next_request(self) -> asyncio.Event:
        """Swallow the next request and cut its connection: the server never sees it."""
        self._request_cut = asyncio.Event()
        return self._request_cut

    def cut_all(self) -> int:
        """Cut every connection that is open now; return how many there were."""
        links = list(self._links)
        for link in links:
            link.close()
        return len(links)

    def lead_to(self, target_port: int) -> None:
        """Forward to another port of the same host from now on; connections that are open are cut."""
        self._target = (self._target[0], target_port)
        self.cut_all()

    def refuse(self, refusing: bool = True) -> None:
        """Cut new connections at once, or stop doing so."""
        self._refusing = refusing

    def pause(self) -> None:
        """Let nothing through, without closing anything: a partition that drops silently."""
        self._flows.clear()

    def resume(self) -> None:
        """Let through again, what was held back first."""
        self._flows.set()

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        if self._refusing:
            writer.transport.abort()
            return
        try:
            server_reader, server_writer = await asyncio.open_connection(*self._target)
        except OSError:
            writer.transport.abort()
            return
        link = _Link(writer, server_writer)
        self._links.add(link)
        up = asyncio.create_task(self._pump_requests(link, reader))
        down = asyncio.create_task(self._pump_answers(link, server_reader))
        self._tasks |= {up, down}
        try:
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            link.close()
            self._links.discard(link)
            await asyncio.wait({up, down})
            self._tasks -= {up, down}

    async def _pump_requests(self, link: _Link, reader: asyncio.StreamReader) -> None:
        while chunk := await _read(reader):
            await self._hold()
            if self._request_cut is not None:
                cut, self._request_cut = self._request_cut, None
                cut.set()
                return
            if self._loss is not None and self._loss.skip:
                self._loss.skip -= 1
            elif self._loss is not None and link.loss is None:
                link.loss = self._loss
            link.server.write(chunk if self.change is None else self.change(chunk))

    async def _pump_answers(self, link: _Link, reader: asyncio.StreamReader) -> None:
        while chunk := await _read(reader):
            await self._hold()
            if link.loss is None:
                link.client.write(chunk)
                continue
            spared = chunk[: link.loss.spared_bytes]
            if spared:
                link.loss.spared_bytes -= len(spared)
                link.client.write(spared)
                chunk = chunk[len(spared) :]
                if not chunk and link.loss.spared_bytes:
                    continue
            link.swallowed += chunk
            if link.loss.happened.is_set():
                continue  # silent from now on
            if link.loss.whole(bytes(link.swallowed)):
                self._lost(link, link.loss)
            elif _greets(bytes(link.swallowed)):
                link.client.write(bytes(link.swallowed))
                link.swallowed.clear()

    def _lost(self, link: _Link, loss: _Loss) -> None:
        self._loss = None
        # Of several that are asked at once, the first to be answered loses its answer; the others get theirs.
        for other in self._links:
            if other is not link and other.loss is loss:
                other.client.write(bytes(other.swallowed))
                other.swallowed.clear()
                other.loss = None
        if loss.and_cut:
            link.close()
        loss.happened.set()

    async def _hold(self) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if not self._flows.is_set():
            self.held += 1
            await self._flows.wait()


def _greets(answer: bytes) -> bool:
    """Say whether PostgreSQL still asks who is there, or says whether it encrypts (its protocol, section 54.2)."""
    return answer.startswith(b"R") or answer in (b"N", b"S", b"G")


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(CHUNK_BYTES)
    except ConnectionError:
        return b""
