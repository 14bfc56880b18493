"""Prometheus metrics, and the loopback server for health and metrics of one process."""

from collections.abc import Callable

from aiohttp import web
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
    """`/healthz`, `/readyz` and `/metrics` of one process."""

    def __init__(self, health: Health, host: str, port: int) -> None:
        self._health = health
        self._host = host
        self._port = port
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen. Raises OSError when the port is taken."""
        app = web.Application()
        app.router.add_get("/healthz", self._live)
        app.router.add_get("/readyz", self._ready)
        app.router.add_get("/metrics", self._metrics)
        self._runner = web.AppRunner(app, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, self._host, self._port).start()

    async def stop(self) -> None:
        """Stop listening."""
        if self._runner is not None:
            await self._runner.cleanup()

    async def _live(self, request: web.Request) -> web.Response:
        return web.json_response({"status": "ok"})

    async def _ready(self, request: web.Request) -> web.Response:
        problems = self._health.problems()
        state = {"status": "not ready" if problems else "ok", "problems": problems}
        return web.json_response(state, status=503 if problems else 200)

    async def _metrics(self, request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": CONTENT_TYPE_LATEST})
