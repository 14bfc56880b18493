"""Health and metrics of a process, as others ask for them."""

import asyncio
import socket
from collections.abc import AsyncIterator

import httpx
import pytest
from hive_common.ops.ports import free_port
from hive_common.ops.telemetry import REQUESTS, Health, OpsServer


@pytest.fixture
def health() -> Health:
    return Health()


@pytest.fixture
async def port(health: Health) -> AsyncIterator[int]:
    port = free_port()
    server = OpsServer(health, "127.0.0.1", port)
    await server.start()
    yield port
    await server.stop()


@pytest.fixture
async def http(port: int) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as client:
        yield client


async def test_one_lives_while_it_answers(http: httpx.AsyncClient) -> None:
    answer = await http.get("/healthz")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_one_is_ready_while_no_check_has_a_problem(http: httpx.AsyncClient, health: Health) -> None:
    problems: list[str] = []
    health.add("database", lambda: problems[0] if problems else None)
    health.add("nats", lambda: None)
    for _ in range(2):
        answer = await http.get("/readyz?from=somebody")
        assert (answer.status_code, answer.json()) == (200, {"status": "ok", "problems": {}})
        problems.append("it is away: ä")
        answer = await http.get("/readyz")
        assert answer.status_code == 503
        assert answer.json() == {"status": "not ready", "problems": {"database": "it is away: ä"}}
        problems.clear()


async def test_metrics_come_in_the_format_of_prometheus(http: httpx.AsyncClient) -> None:
    REQUESTS.labels("telemetry", "ok").inc()
    answer = await http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    assert 'hive_requests_total{code="ok",method="telemetry"} 1.0' in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/", 404), ("GET", "/healthz/", 404), ("POST", "/healthz", 405)]
)
async def test_there_is_nothing_else(http: httpx.AsyncClient, method: str, path: str, status: int) -> None:
    assert (await http.request(method, path)).status_code == status


@pytest.mark.parametrize(
    "said", [b"", b"GET /readyz", b"\0\xff\r\n\r\n", b"\r\n\r\n", b"x" * 200_000, b"GET\r\n\r\n"]
)
async def test_who_says_nonsense_keeps_nobody_from_asking(http: httpx.AsyncClient, port: int, said: bytes) -> None:
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(said)
        assert (await http.get("/readyz")).status_code == 200
    finally:
        writer.close()


async def test_a_port_that_is_taken_is_an_error(health: Health) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other, pytest.raises(OSError, match="in use"):
        await OpsServer(health, "127.0.0.1", other.getsockname()[1]).start()
