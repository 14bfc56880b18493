"""A TCP proxy that does to a connection what networks do: delays, silence, and cuts at the worst moment.

async with TcpProxy(port) as proxy:
    cut = proxy.cut_next_answer(until=POSTGRES_READY)
    ...                      # the next request reaches the server, its answer is swallowed
    await cut.wait()
"""

import asyncio
from dataclasses import dataclass, field

CHUNK_BYTES = 65_536
POSTGRES_READY = b"Z\x00\x00\x00\x05I"
"""ReadyForQuery, idle: the server has committed what it was sent (PostgreSQL protocol, section 54.7)."""


@dataclass(eq=False)
class _Link:
    client: asyncio.StreamWriter
    server: asyncio.StreamWriter
    swallow_until: bytes | None = None
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
    """

    def __init__(self, target_port: int, *, target_host: str = "127.0.0.1") -> None:
        self.port = 0
        self.delay_s = 0.0
        self.connections = 0
        self._target = (target_host, target_port)
        self._server: asyncio.Server | None = None
        self._links: set[_Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self._refusing = False
        self._answer_cut: tuple[bytes, asyncio.Event] | None = None
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

    def cut_next_answer(self, until: bytes = b"") -> asyncio.Event:
        """Forward the next request, swallow its answer up to where `until` appears, then cut that connection.

        Returns an event that is set when it happened. By then the server has done what it was asked.
        """
        event = asyncio.Event()
        self._answer_cut = (until, event)
        return event

    def cut_next_request(self) -> asyncio.Event:
        """Swallow the next request and cut its connection: the server never sees it."""
        self._request_cut = asyncio.Event()
        return self._request_cut

    def cut_all(self) -> None:
        """Cut every connection that is open now."""
        for link in list(self._links):
            link.close()

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
            if self._answer_cut is not None and link.swallow_until is None:
                link.swallow_until = self._answer_cut[0]
            link.server.write(chunk)

    async def _pump_answers(self, link: _Link, reader: asyncio.StreamReader) -> None:
        while chunk := await _read(reader):
            await self._hold()
            if link.swallow_until is None:
                link.client.write(chunk)
                continue
            link.swallowed += chunk
            if link.swallow_until in link.swallowed:
                assert self._answer_cut is not None
                cut, self._answer_cut = self._answer_cut[1], None
                link.close()
                cut.set()
                return

    async def _hold(self) -> None:
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        await self._flows.wait()


async def _read(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(CHUNK_BYTES)
    except ConnectionError:
        return b""
