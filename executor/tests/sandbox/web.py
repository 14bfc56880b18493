"""A web server on loopback that says what a test wants, byte for byte, and a resolver that says what it wants."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

from hive_common.kernel.errors import Unavailable


class Names:
    """A resolver with a list of answers for each name, given one after the other; the last one for ever."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self._answers = {name.replace("_", "."): list(found) for name, found in answers.items()}
        self.asked: list[str] = []

    async def addresses(self, name: str) -> Sequence[str]:
        self.asked.append(name)
        if name not in self._answers:
            if name.replace(".", "").isdigit() or ":" in name:
                return [name]
            raise Unavailable(f"{name} cannot be looked up: it does not exist")
        found = self._answers[name]
        return found.pop(0) if len(found) > 1 else found[0]


class Web:
    """What was asked of the server: whole requests, as they came."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.requests: list[str] = []

    @property
    def headers(self) -> dict[str, str]:
        """Of the last request, by name in lower case."""
        lines = self.requests[-1].split("\r\n\r\n")[0].split("\r\n")[1:]
        return {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}


Answer = Callable[[str], bytes]


@asynccontextmanager
async def serving(
    answer: Answer | bytes, *, context: ssl.SSLContext | None = None, hangs: bool = False
) -> AsyncIterator[Web]:
    """Serve; `answer` is given each path."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            length = next(
                (int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:")), 0
            )
            web.requests.append(head + (await reader.readexactly(length)).decode())
            path = head.split(" ")[1]
            writer.write(answer(path) if callable(answer) else answer)
            await writer.drain()
            if hangs:
                await reader.read()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context)
    web = Web(server.sockets[0].getsockname()[1])
    try:
        yield web
    finally:
        server.close()


def ok(body: bytes | str = b"fine", *headers: str) -> bytes:
    """Return a whole answer."""
    body = body.encode() if isinstance(body, str) else body
    lines = ["HTTP/1.1 200 OK", f"Content-Length: {len(body)}", "Connection: close", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(location: str, status: int = 302) -> bytes:
    """Return an answer that sends the client elsewhere."""
    return (
        f"HTTP/1.1 {status} Elsewhere\r\nLocation: {location}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    ).encode()
