"""docker-compose.yml on a real engine: images, a job through the published port, restarts, metrics."""

import contextlib
import json
import os
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from hive_common.ops.ports import free_port
from hive_common.testing.installation import assert_exactly_once, wait_until

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "examples" / "squares"
ASKS = ROOT / "examples" / "changes"
NUMBERS = list(range(20))
TOTAL = sum(number**2 for number in NUMBERS)
LONG_RUNNING = (
    "postgres",
    "nats",
    "registry",
    "scheduler",
    "router",
    "audit",
    "gateway",
    "executor-1",
    "prometheus",
)
BUILD_S = 1200
UP_S = 300

pytestmark = pytest.mark.timeout(BUILD_S + UP_S)


def answers(*command: str) -> bool:
    try:
        return subprocess.run(command, capture_output=True, timeout=30, check=False).returncode == 0
    except FileNotFoundError:
        return False


class Stack:
    """One project of compose, with ports and volumes of its own."""

    def __init__(self) -> None:
        self.url = f"http://127.0.0.1:{free_port()}"
        self._environment = {
            **os.environ,
            "HIVE_HTTP_PORT": self.url.rpartition(":")[2],
            "HIVE_GRPC_PORT": str(free_port()),
        }
        if not answers("docker", "buildx", "version"):
            self._environment["DOCKER_BUILDKIT"] = "0"
        plugin = answers("docker", "compose", "version")
        program = ["docker", "compose"] if plugin else ["docker-compose"]
        self._command = [
            *program,
            "-f",
            str(ROOT / "docker-compose.yml"),
            "-p",
            f"hive-test-{uuid.uuid4().hex[:8]}",
        ]

    def __call__(self, *arguments: str, timeout_s: float = 120, check: bool = True) -> str:
        """Run a command of compose and return what it printed."""
        done = subprocess.run(
            [*self._command, *arguments],
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if check and done.returncode != 0:
            logs = subprocess.run(
                [*self._command, "logs", "--tail", "15"],
                env=self._environment,
                capture_output=True,
                text=True,
                check=False,
            ).stdout
            raise AssertionError(f"compose {' '.join(arguments)}: {done.returncode}\n{done.stderr[-4000:]}\n{logs}")
        return done.stdout

    def healthy(self) -> bool:
        """Say whether everything that runs for long is up and calls itself ready."""
        shown = [json.loads(line) for line in self("ps", "--format", "json").splitlines()]
        health = {one["Service"]: one["Health"] for one in shown}
        return {name: health.get(name) for name in LONG_RUNNING} == dict.fromkeys(LONG_RUNNING, "healthy")

    def query(self, expression: str) -> float:
        """Ask Prometheus, which is not published, from inside; the sum of what it answers."""
        url = str(httpx.URL("http://127.0.0.1:9090/api/v1/query", params={"query": expression}))
        answer = json.loads(self("exec", "-T", "prometheus", "wget", "-q", "-O", "-", url))
        return sum(float(one["value"][1]) for one in answer["data"]["result"])


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    made = Stack()
    try:
        made("build", timeout_s=BUILD_S)
        made("up", "--detach", "--no-build", "--wait", "--wait-timeout", str(UP_S), timeout_s=UP_S + 30)
        yield made
    finally:
        made("--profile", "tools", "down", "--volumes", "--remove-orphans", check=False)


@pytest.fixture(scope="module")
def gateway(stack: Stack) -> Iterator[httpx.Client]:
    key = stack("exec", "-T", "gateway", "cat", "/var/lib/hive/api-key").strip()
    with httpx.Client(
        base_url=stack.url, headers={"authorization": f"Bearer {key}"}, trust_env=False, timeout=30
    ) as client:
        yield client


@pytest.fixture(scope="module")
def job(stack: Stack) -> dict[str, Any]:
    """The job of the squares example; its agents are published by the CLI in a container."""
    mount = f"{EXAMPLE}:/agents:ro"
    stack("run", "--rm", "-T", "--no-deps", "-v", mount, "hive", "agent", "push", "/agents/square", "/agents/total")
    document: dict[str, Any] = yaml.safe_load((EXAMPLE / "job.yaml").read_text())
    document["limits"]["deadline"] = "300s"
    return {**document, "input": {"numbers": NUMBERS}}


def submit(gateway: httpx.Client, job: dict[str, Any], timeout_s: float = 120) -> str:
    """Submit as a careful client does: with a key, and again while the answer is that nobody is there."""
    key, deadline = str(uuid.uuid4()), time.monotonic() + timeout_s
    while True:
        said = "no connection"
        with contextlib.suppress(httpx.TransportError):
            answer = gateway.post("/v1/jobs", json=job, headers={"idempotency-key": key})
            if answer.status_code in (200, 201):
                job_id: str = answer.json()["job_id"]
                return job_id
            said = answer.text
            assert answer.status_code in (502, 503, 504), said
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


def ended(gateway: httpx.Client, job_id: str) -> bool:
    try:
        answer = gateway.get(f"/v1/jobs/{job_id}")
    except httpx.TransportError:
        return False  # the gateway itself is being restarted
    return answer.status_code == 200 and answer.json()["state"] in {"succeeded", "failed", "cancelled"}


def assert_right(gateway: httpx.Client, job_id: str) -> None:
    found = gateway.get(f"/v1/jobs/{job_id}").json()
    assert (found["state"], found["output"]) == ("succeeded", {"total": TOTAL}), found
    events = gateway.get(f"/v1/jobs/{job_id}/events", params={"limit": 10_000}).json()["events"]
    assert_exactly_once(events)


def test_a_job_through_the_published_port_ends_with_the_right_result(
    gateway: httpx.Client, job: dict[str, Any]
) -> None:
    job_id = submit(gateway, job)
    wait_until(lambda: ended(gateway, job_id), 120, "the job has ended")
    assert_right(gateway, job_id)


def test_images_hold_one_member_and_run_as_nobody_special(stack: Stack) -> None:
    find = "import importlib.util as u, os; print(os.getuid(), *(bool(u.find_spec(m)) for m in {!r}))"
    engine = ("wasmtime", "hive_executor", "hive_cli")
    for service in ("registry", "scheduler", "router", "audit", "gateway"):
        others = [
            f"hive_{other}" for other in ("registry", "scheduler", "router", "audit", "gateway") if other != service
        ]
        said = stack("exec", "-T", service, "python", "-c", find.format([*engine, *others]))
        assert said.split() == ["10001", *["False"] * (len(engine) + len(others))], service
    said = stack(
        "exec", "-T", "executor-1", "python", "-c", find.format(["hive_gateway", "hive_cli", "hive_executor"])
    )
    assert said.split() == ["10001", "False", "False", "True"]


def test_an_agent_is_signed_trusted_granted_and_stopped(stack: Stack, gateway: httpx.Client) -> None:
    def hive(*arguments: str, check: bool = True) -> str:
        return stack("run", "--rm", "-T", "--no-deps", "-v", f"{ASKS}:/agents:ro", "hive", *arguments, check=check)

    push = ("agent", "push", "/agents/notice", "/agents/report", "--key", "ada")
    run = ("run", "/agents/job.yaml", "--input", "files=@/agents/*.md", "--json")
    hive("agent", "key", "new", "ada")
    assert hive(*push, check=False) == "", "nobody trusts this key yet"
    hive("agent", "key", "trust", "ada")
    assert "hive agent grant change-notice kv" in hive(*push)
    refused = gateway.post(
        "/v1/jobs", json=yaml.safe_load((ASKS / "job.yaml").read_text()) | {"input": {"files": []}}
    )
    assert (refused.status_code, "hive agent grant change-notice kv" in refused.text) == (403, True)
    hive("agent", "grant", "change-notice", "kv")
    assert "README.md" in hive(*run)
    hive("kill", "--agent", "change-notice")
    assert hive(*run, check=False) == "", "it is stopped"
    hive("unkill", "--agent", "change-notice")
    assert "README.md" not in json.dumps(json.loads(hive(*run))["output"]["new"]), "it was there the last time"


@pytest.mark.parametrize("service", LONG_RUNNING)
def test_jobs_submitted_before_during_and_after_the_restart_of_a_container_end_right(
    stack: Stack, gateway: httpx.Client, job: dict[str, Any], service: str
) -> None:
    job_ids = [submit(gateway, job)]
    with ThreadPoolExecutor(1) as pool:
        restart = pool.submit(stack, "restart", "--timeout", "5", service)
        while not restart.done():
            job_ids.append(submit(gateway, job))
            time.sleep(0.3)
        restart.result()
    job_ids.append(submit(gateway, job))
    for job_id in job_ids:
        wait_until(lambda job_id=job_id: ended(gateway, job_id), 240, f"{job_id} has ended")
    wait_until(stack.healthy, 120, f"all are healthy after the restart of {service}")
    for job_id in job_ids:
        assert_right(gateway, job_id)


def test_the_log_verifies_after_all_of_that(gateway: httpx.Client) -> None:
    verified = gateway.get("/v1/audit/verify", timeout=60).json()
    assert verified["ok"], verified
    assert verified["events"] == verified["head"] > len(LONG_RUNNING) * len(NUMBERS)


def test_prometheus_sees_every_process_and_the_rate_of_tasks(
    stack: Stack, gateway: httpx.Client, job: dict[str, Any]
) -> None:
    wait_until(lambda: stack.query("sum(up)") == 6, 60, "Prometheus reaches the five services and the executor")
    job_id = submit(gateway, job)
    wait_until(lambda: ended(gateway, job_id), 120, "the job has ended")
    rate = 'sum(rate(hive_placements_total{process="scheduler"}[1m]))'
    wait_until(lambda: stack.query(rate) > 0, 60, "the rate of placed tasks is above zero")
