"""Asks a process whether it lives and whether it is ready."""

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from enum import Enum

import msgspec

HOST = "127.0.0.1"
ANSWER_S = 2.0
PROBLEM_CHARACTERS_MAX = 500


class Answer(Enum):
    """What came back. `UNREADY`: it lives, and says that something it needs is missing."""

    READY = "ready"
    UNREADY = "unready"
    SILENT = "silent"


@dataclass(frozen=True)
class Probed:
    """An answer and, where it is not `READY`, one sentence about it."""

    answer: Answer
    problem: str = ""


class _Readiness(msgspec.Struct):
    problems: dict[str, str]


Probe = Callable[[], Awaitable[Probed]]


def http_probe(port: int, path: str = "/readyz", good_enough: str | None = None) -> Probe:
    """Return a probe of an HTTP server: 200 is ready, another status is alive, no answer is silence.

    With `good_enough`, an answer that has this text in it is ready as well.
    """
    url = f"http://{HOST}:{port}{path}"

    async def probe() -> Probed:
        try:
            async with asyncio.timeout(ANSWER_S):
                status, text = await _get(port, path)
        except (OSError, ValueError) as error:
            return Probed(Answer.SILENT, f"{url}: {str(error) or type(error).__name__}")
        if status == 200 or (good_enough is not None and good_enough in text):
            return Probed(Answer.READY)
        return Probed(Answer.UNREADY, _problems_in(text))

    return probe


async def _get(port: int, path: str) -> tuple[int, str]:
    """Return status and body. Raises ValueError where the answer is none.

    A supervisor asks nothing else over HTTP, and every `up` would wait for a library to load.
    """
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(f"GET {path} HTTP/1.0\r\nHost: {HOST}:{port}\r\n\r\n".encode())
        head, _, body = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        writer.close()
    _, status, *_ = head.split(maxsplit=2)
    return int(status), body.decode(errors="replace")


def _problems_in(text: str) -> str:
    """Return the sentences of a `/readyz` that says no, or its text where it has another shape."""
    try:
        problems = msgspec.json.decode(text, type=_Readiness).problems
    except msgspec.DecodeError:
        return text[:PROBLEM_CHARACTERS_MAX]
    return "; ".join(f"{name}: {problem}" for name, problem in problems.items())[:PROBLEM_CHARACTERS_MAX]


def postgres_probe(dsn: Callable[[], str]) -> Probe:
    """Return a probe of PostgreSQL. Recovery after a crash counts as alive."""

    async def probe() -> Probed:
        import psycopg  # an `up` has other things to do before

        try:
            async with asyncio.timeout(ANSWER_S * 2):
                conn = await psycopg.AsyncConnection.connect(dsn(), connect_timeout=2)
                await conn.close()
        except psycopg.OperationalError as error:
            text = str(error).strip().splitlines()[-1]
            # 57P03 has no class of its own when it comes at connect: the text is all there is.
            starting = "starting up" in text or "recovery" in text or "not yet accepting" in text
            return Probed(Answer.UNREADY if starting else Answer.SILENT, text)
        except TimeoutError:
            return Probed(Answer.SILENT, "no answer")
        return Probed(Answer.READY)

    return probe
