"""A wire to a NATS server on which messages overtake each other and come twice.

NATS itself does neither on one connection; several servers, a client that reconnects and sends again, or a retry
of a caller do. The wire does so between one client and the server, in both directions, by the client protocol:
`PUB` and `HPUB` of the client, `MSG` and `HMSG` of the server. Everything else passes at once.
"""

import asyncio
import random

from hive_common.testing.proxy import CHUNK_BYTES

MESSAGES = (b"PUB", b"HPUB", b"MSG", b"HMSG")


class ShufflingWire:
    """Forwards connections from a free loopback port to the NATS server on 127.0.0.1:`target_port`.

    Args:
        target_port: of the server.
        rng: decides about every message.
        delay_s: a message waits for up to so long, and comes behind others that wait less.
        stragglers: share of messages that wait for up to `straggle_s` instead.
        twice: share of messages of which a copy follows.
        straggle_s: see `stragglers`; a copy waits for up to so long on top.

    Attributes:
        port: where clients connect.
        copies: how many messages came twice so far.
        overtaken: how many messages came behind one that was sent after them.
    """

    def __init__(
        self,
        target_port: int,
        rng: random.Random,
        *,
        delay_s: float,
        stragglers: float,
        twice: float,
        straggle_s: float,
    ) -> None:
        self.port = 0
        self.copies = 0
        self.overtaken = 0
        self._target_port = target_port
        self._rng = rng
        self._delay_s = delay_s
        self._twice = twice
        self._stragglers = stragglers
        self._straggle_s = straggle_s
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "ShufflingWire":
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, limit=CHUNK_BYTES)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._server is not None
        self._server.close()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            server_reader, server_writer = await asyncio.open_connection(
                "127.0.0.1", self._target_port, limit=CHUNK_BYTES
            )
        except OSError:
            writer.transport.abort()
            return
        pumps = {
            asyncio.create_task(self._pump(reader, server_writer)),
            asyncio.create_task(self._pump(server_reader, writer)),
        }
        self._tasks |= pumps
        try:
            await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for pump in pumps:
                pump.cancel()
            writer.transport.abort()
            server_writer.transport.abort()
            await asyncio.gather(*pumps, return_exceptions=True)
            self._tasks -= pumps

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sent = _Order()
        try:
            while True:
                line = await reader.readuntil(b"\r\n")
                words = line.split()
                if words and words[0].upper() in MESSAGES:
                    frame = line + await reader.readexactly(int(words[-1]) + 2)
                    self._deliver(frame, writer, sent)
                else:
                    writer.write(line)
        except (asyncio.IncompleteReadError, ConnectionError):
            return

    def _deliver(self, frame: bytes, writer: asyncio.StreamWriter, sent: "_Order") -> None:
        loop = asyncio.get_running_loop()
        straggles = self._rng.random() < self._stragglers
        wait_s = self._rng.uniform(0, self._straggle_s if straggles else self._delay_s)
        number = sent.next()
        loop.call_later(wait_s, self._write, frame, writer, sent, number)
        if self._rng.random() < self._twice:
            loop.call_later(wait_s + self._rng.uniform(0, self._straggle_s), self._copy, frame, writer)

    def _write(self, frame: bytes, writer: asyncio.StreamWriter, sent: "_Order", number: int) -> None:
        if not writer.is_closing():
            self.overtaken += sent.is_behind(number)
            writer.write(frame)

    def _copy(self, frame: bytes, writer: asyncio.StreamWriter) -> None:
        if not writer.is_closing():
            self.copies += 1
            writer.write(frame)


class _Order:
    """Numbers of the messages of one direction, as they were sent and as they came."""

    def __init__(self) -> None:
        self._given = 0
        self._highest = 0

    def next(self) -> int:
        self._given += 1
        return self._given

    def is_behind(self, number: int) -> bool:
        behind = number < self._highest
        self._highest = max(self._highest, number)
        return behind
