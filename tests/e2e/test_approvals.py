"""A permission with a question at each use: the attempt waits, a person decides, and just that happens."""

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import httpx
import pytest
from hive_common.testing.installation import Installation, assert_exactly_once, wait_until

pytestmark = pytest.mark.timeout(300)

MANIFEST = """\
apiVersion: hive/v1
kind: Agent
name: caller
version: 1.0.0
runtime: python
entry: agent.py
resources: {{memory: 64Mi, timeout: 20s}}
permissions:
  http: {{hosts: ["http://127.0.0.1:{port}"], methods: [GET, POST], private: true}}
  kv: {{namespace: asked, quota: 1Ki}}
"""
# It catches whatever Python can catch, and goes on.
AGENT = """\
from hive import http, kv

def run(input):
    for key, value in input["kept"].items():
        kv.put(key, value)
    try:
        for body in input["bodies"]:
            answer = http.post(input["url"], body=body, headers={"authorization": "secret"})
    except BaseException as error:
        return {"caught": getattr(error, "code", type(error).__name__)}
    return {"status": answer.status if input["bodies"] else 0}
"""
HOSTILE = "pay\u202e1000\u202c\x1b[2K\r0"


class Web(ThreadingHTTPServer):
    """Counts what is posted."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.bodies: list[str] = []


class Handler(BaseHTTPRequestHandler):
    """Takes a body."""

    def do_POST(self) -> None:
        """Remember the body."""
        assert isinstance(self.server, Web)
        self.server.bodies.append(self.rfile.read(int(self.headers["content-length"])).decode())
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def web() -> Iterator[Web]:
    with Web() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture(scope="module")
def asking(hive_home: Installation, web: Web, tmp_path_factory: pytest.TempPathFactory) -> Installation:
    """The agent `caller` is published, and may post where a person says so each time."""
    folder = tmp_path_factory.mktemp("agents") / "caller"
    folder.mkdir()
    (folder / "manifest.yaml").write_text(MANIFEST.format(port=web.server_port))
    (folder / "agent.py").write_text(AGENT)
    hive_home.hive("agent", "push", str(folder))
    said = hive_home.hive("agent", "grant", "caller", "http", "kv", "--ask").stdout
    assert "a person is asked each time" in " ".join(said.split())
    return hive_home


def submitted(home: Installation, web: Web, *bodies: str, **kept: Any) -> str:
    return home.submit(
        {
            "apiVersion": "hive/v1",
            "kind": "Job",
            "name": "posts",
            "input": {"url": f"http://127.0.0.1:{web.server_port}/pay", "bodies": list(bodies), "kept": kept},
            "tasks": [{"id": "posts", "agent": "caller@1.0.0", "input": "${input}"}],
            "output": "${tasks.posts.output}",
        }
    )


def waiting(home: Installation, job: str) -> dict[str, Any]:
    """Return the one approval that an attempt of a job waits for."""
    found: list[dict[str, Any]] = []

    def waits() -> bool:
        found[:] = home.get("/v1/approvals", job=job)["approvals"]
        assert found or home.get(f"/v1/jobs/{job}")["state"] == "running"
        return bool(found)

    wait_until(waits, 120, f"an attempt of job {job} asks")
    assert len(found) == 1
    return found[0]


def ended(home: Installation, job: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def has_ended() -> bool:
        found.update(home.get(f"/v1/jobs/{job}"))
        return found["state"] in ("succeeded", "failed", "cancelled")

    wait_until(has_ended, 120, f"job {job} ended")
    return found


def events_of(home: Installation, job: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = home.get(f"/v1/jobs/{job}/events", limit=1000)["events"]
    return found


def decided(gateway: httpx.Client, approval: dict[str, Any], verb: str, hash_: str = "") -> httpx.Response:
    body = {"hash": hash_ or approval["hash"], "reason": "" if verb == "approve" else "not today"}
    return gateway.post(f"/v1/approvals/{approval['approval_id']}/{verb}", json=body)


def test_an_attempt_waits_until_a_person_approves_and_then_does_just_that(
    asking: Installation, web: Web, gateway: httpx.Client
) -> None:
    job = submitted(asking, web, HOSTILE)
    approval = waiting(asking, job)
    assert HOSTILE not in web.bodies
    shown = "\n".join(approval["shown"])
    assert "what.body.begins: pay1000 0" in approval["shown"]
    assert f"what.url: http://127.0.0.1:{web.server_port}/pay" in shown and "what.method: POST" in shown
    assert '"secret"' not in approval["action"] and "what.headers.authorization: sha256:" in shown
    # Who saw another action has not approved of this one.
    assert decided(gateway, approval, "approve", "0" * 64).status_code == 409
    listed = asking.hive("approvals").stdout
    assert approval["approval_id"] in listed and "\u202e" not in listed and "\x1b" not in listed
    told = asking.hive("approvals", "approve", approval["approval_id"], "--yes").stdout
    assert "approved" in told
    found = ended(asking, job)
    assert (found["state"], found["output"]) == ("succeeded", {"status": 200})
    assert web.bodies.count(HOSTILE) == 1
    events = events_of(asking, job)
    assert_exactly_once(events)
    types = [event["type"] for event in events]
    assert types.count("ApprovalRequested") == types.count("ApprovalDecided") == 1
    assert "ApprovalExpired" not in types


def test_what_is_denied_does_not_happen_and_says_by_which_permission(
    asking: Installation, web: Web, gateway: httpx.Client
) -> None:
    job = submitted(asking, web, "denied")
    approval = waiting(asking, job)
    assert decided(gateway, approval, "deny").status_code == 200
    found = ended(asking, job)
    assert (found["state"], found["error"]["code"]) == ("failed", "permission_denied")
    assert "the permission `http` was denied for this use by a person" in found["error"]["message"]
    assert "not today" in found["error"]["message"]
    assert "denied" not in web.bodies
    # It is decided, once.
    assert decided(gateway, approval, "approve").status_code == 409


def test_what_is_kept_was_approved_write_by_write(asking: Installation, web: Web, gateway: httpx.Client) -> None:
    job = submitted(asking, web, first=1, second={"n": 2})
    for key, value in (("first", "1"), ("second", '{"n":2}')):
        approval = waiting(asking, job)
        assert {f"what.key: {key}", f"what.value.begins: {value}"} <= set(approval["shown"])
        assert decided(gateway, approval, "approve").status_code == 200
        wait_until(lambda: approval not in asking.get("/v1/approvals")["approvals"], 60, "it is decided")  # noqa: B023
    assert ended(asking, job)["state"] == "succeeded"
    assert asking.get("/v1/values/asked/keys")["keys"] == ["first", "second"]
    assert asking.get("/v1/values/asked", key="second")["value"] == {"n": 2}


def test_what_waits_survives_the_scheduler_and_its_executor(
    asking: Installation, web: Web, gateway: httpx.Client
) -> None:
    job = submitted(asking, web, "survives")
    before = waiting(asking, job)
    shown = asking.hive("job", "show", job).stdout
    assert "1 wait for your decision" in shown and "active, waits for a person" in shown
    pids = asking.pids()
    asking.kill(pids["scheduler"])
    executors = [one for one in pids if one.startswith("executor")]
    for one in executors:
        asking.kill(pids[one])
    # The attempts are lost with their executor, and the task's next one asks for the same.
    after: list[dict[str, Any]] = []

    def asks_again() -> bool:
        try:
            after[:] = asking.get("/v1/approvals", job=job)["approvals"]
            return bool(after) and asking.get(f"/v1/jobs/{job}")["attempts"] == 2
        except OSError:
            return False

    wait_until(asks_again, 110, "the next attempt runs")
    assert after == [before]
    assert decided(gateway, before, "approve").status_code == 200
    found = ended(asking, job)
    assert (found["state"], found["output"]) == ("succeeded", {"status": 200})
    assert web.bodies.count("survives") == 1
    events = events_of(asking, job)
    assert_exactly_once(events)
    assert [event["type"] for event in events].count("ApprovalRequested") == 1
    assert asking.verify()["ok"]
    asking.wait_ready()
