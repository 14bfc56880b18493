"""Prometheus metrics, and the loopback server for health and metrics of one process."""

import asyncio
import contextlib
from collections.abc import Callable
from http import HTTPStatus

import msgspec
from prometheus_client import CONTENT_TYPE_LATEST, REGISTRY, Counter, Gauge, Histogram, generate_latest

Check = Callable[[], str | None]
"""Returns None when fine, else one sentence that says what is not."""

REQUESTS = Counter("hive_requests_total", "Calls handled, by method and code of the answer", ["method", "code"])
DURATION = Histogram(
    "hive_request_duration_seconds",
    "Time to answer a call; of a stream, to its first message",
    ["method"],
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10),
)
FENCED = Counter("hive_executors_fenced_total", "Executors that flooded a subject, and were not heard for a while")
IN_FLIGHT = Gauge("hive_requests_in_flight", "Calls that are being handled; open streams and long polls are such")


REQUEST_S = 5.0
"""How long a request, and the way of its answer, may take."""


class Health:
    """Named readiness checks of one process. It is live while its loop answers, ready when all checks pass."""

    def __init__(self) -> None:
        self._checks: dict[str, Check] = {}

    def add(self, name: str, check: Check) -> None:
        """Register a check. It MUST NOT block."""
        self._checks[name] = check

    def problems(self) -> dict[str, str]:
        """Return the checks that fail, each with its sentence."""
        found = {name: check() for name, check in self._checks.items()}
        return {name: problem for name, problem in found.items() if problem is not None}


class OpsServer:
    """`/healthz`, `/readyz` and `/metrics` of one process.

    It reads no more of a request than its first line, and ends the connection after each answer: nothing here is
    worth a library that every process would load.
    """

    def __init__(self, health: Health, host: str, port: int) -> None:
        self._health = health
        self._host = host
        self._port = port
        self._server: asyncio.Server | None = None

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        self._server = await asyncio.start_server(self._connected, self._host, self._port)

    async def stop(self) -> None:
        """Stop listening."""
        if self._server is not None:
            self._server.close()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            async with asyncio.timeout(REQUEST_S):
                head = await reader.readuntil(b"\r\n\r\n")
                writer.write(_response(*self._answer(head)))
                await writer.drain()
        writer.close()

    def _answer(self, head: bytes) -> tuple[HTTPStatus, str, bytes]:
        """Return status, type and body."""
        method, target, *_ = [*head.split(b"\r\n", 1)[0].decode("ascii", "replace").split(), "", ""]
        if method != "GET":
            return HTTPStatus.METHOD_NOT_ALLOWED, "text/plain", b"expected GET\n"
        match target.partition("?")[0]:
            case "/healthz":
                return HTTPStatus.OK, "application/json", msgspec.json.encode({"status": "ok"})
            case "/readyz":
                problems = self._health.problems()
                state = {"status": "not ready" if problems else "ok", "problems": problems}
                status = HTTPStatus.SERVICE_UNAVAILABLE if problems else HTTPStatus.OK
                return status, "application/json", msgspec.json.encode(state)
            case "/metrics":
                return HTTPStatus.OK, CONTENT_TYPE_LATEST, generate_latest(REGISTRY)
        return HTTPStatus.NOT_FOUND, "text/plain", b"expected /healthz, /readyz or /metrics\n"


def _response(status: HTTPStatus, kind: str, body: bytes) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    )
    return head.encode() + body
