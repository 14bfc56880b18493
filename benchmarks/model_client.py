"""An HTTP/1.1 client that costs little, for calls of models: what it takes itself lies on every figure.

One connection carries one call at a time. What a stream brings is counted as it comes: every token of a scripted
back end is a number, so that a loss, a repetition or another order is seen.
"""

import asyncio
import json
import re
import time
from dataclasses import dataclass, field
from typing import Final

TOKEN: Final = re.compile(rb'"content": ?"(\d+) "')
LIMIT: Final = 1 << 20
LAST_CHUNK: Final = b"\r\n0\r\n\r\n"


@dataclass(frozen=True)
class Target:
    """Where calls go, and what they carry."""

    name: str
    port: int
    model: str
    headers: dict[str, str] = field(default_factory=dict)

    def request(self, *, stream: bool) -> bytes:
        """Return the bytes of a chat completion."""
        messages = [{"role": "user", "content": "count for me, please, from nought on"}]
        body: dict[str, object] = {"model": self.model, "messages": messages}
        if stream:
            body["stream"] = True
        content = json.dumps(body).encode()
        named = {"Host": f"127.0.0.1:{self.port}", "Content-Type": "application/json", **self.headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        head = f"POST /v1/chat/completions HTTP/1.1\r\n{lines}Content-Length: {len(content)}\r\n\r\n"
        return head.encode() + content


class Failed(RuntimeError):
    """A call whose answer is not what it has to be."""


class Connection:
    """One connection, opened with the first call."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._whole = target.request(stream=False)
        self._stream = target.request(stream=True)

    async def open(self) -> None:
        """Connect."""
        self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._target.port, limit=LIMIT)

    async def close(self) -> None:
        """Cut the connection."""
        self._writer.transport.abort()

    async def whole(self) -> float:
        """Make a call that is not streamed; seconds until its last byte."""
        began = time.perf_counter()
        self._writer.write(self._whole)
        length = await self._head()
        body = await (self._chunks() if length is None else self._reader.readexactly(length))
        if b'"content"' not in body:
            raise Failed(f"{self._target.name}: {body[:300]!r}")
        return time.perf_counter() - began

    async def stream(self, tokens: int) -> list[float]:
        """Make a streamed call; seconds until each of its tokens. Raises Failed unless all come, in order."""
        times: list[float] = []
        began = time.perf_counter()
        self._writer.write(self._stream)
        await self._head()
        rest, tail, expected = b"", b"", 0
        while tail != LAST_CHUNK:
            data = await self._reader.read(LIMIT)
            now = time.perf_counter()
            if not data:
                raise Failed(f"{self._target.name}: the stream ended after {expected} tokens")
            rest += data
            tail = (tail + data)[-len(LAST_CHUNK) :]
            end = 0
            for found in TOKEN.finditer(rest):
                if int(found[1]) != expected:
                    raise Failed(f"{self._target.name}: token {int(found[1])} came where {expected} was due")
                expected += 1
                times.append(now - began)
                end = found.end()
            # What is left may hold the beginning of a token, which is no longer than this.
            rest = rest[end:][-64:]
        if expected != tokens:
            raise Failed(f"{self._target.name}: {expected} of {tokens} tokens came")
        return times

    async def begin_and_leave(self) -> float:
        """Make a streamed call, and cut the connection with its first token; when that was, on the loop's clock."""
        self._writer.write(self._stream)
        await self._reader.readuntil(b'"content"')
        await self.close()
        return asyncio.get_running_loop().time()

    async def _head(self) -> int | None:
        """Read the head; the length of the body, None where it comes in chunks."""
        lines = (await self._reader.readuntil(b"\r\n\r\n")).lower().split(b"\r\n")
        length = next((int(line[15:]) for line in lines if line.startswith(b"content-length:")), None)
        if b" 200" not in lines[0]:
            body = await self._reader.readexactly(length) if length else b""
            raise Failed(f"{self._target.name}: {lines[0]!r} {body[:300]!r}")
        return length

    async def _chunks(self) -> bytes:
        parts = []
        while size := int(await self._reader.readline(), 16):
            parts.append((await self._reader.readexactly(size + 2))[:-2])
        await self._reader.readexactly(2)
        return b"".join(parts)
