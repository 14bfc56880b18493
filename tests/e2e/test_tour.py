"""What the README's tour does, as a program would do it."""

import json
import stat
import time
from pathlib import Path

import httpx
import psutil
import pytest
import yaml
from hive_common.testing.installation import Installation, assert_exactly_once
from prometheus_client.parser import text_string_to_metric_families

RUN_KEYS = {"job_id", "state", "output", "tasks", "attempts", "duration_ms"}
CALLS = {"hive_requests", "hive_request_duration_seconds", "hive_requests_in_flight"}
LOG = {"hive_log_head", "hive_projection_lag_events"}
MEASURED = {
    "registry": {*CALLS, *LOG, "hive_append_queue_events"},
    "scheduler": {*CALLS, *LOG, "hive_queue_depth", "hive_pulls_pending", "hive_attempts_live"},
    "router": {*CALLS, *LOG},
    "audit": {*CALLS, *LOG, "hive_audit_position", "hive_audit_broken", "hive_relay_position"},
    "gateway": {*CALLS, "hive_gateway_streams", "hive_gateway_peer_up"},
    "executor": {
        "hive_executor_attempts",
        "hive_executor_attempt_duration_seconds",
        "hive_executor_attempts_held",
        "hive_executor_spool_reports",
    },
}
"""Rate and errors (calls by code), duration, queues, head and lag, as far as a process has them."""
READS_LOG = {"registry", "scheduler", "router", "audit"}
PROCESSES = {"postgres", "nats", "registry", "scheduler", "router", "audit", "gateway", "executor-1", "executor-2"}


def test_status_names_every_process_and_both_executors(hive_home: Installation) -> None:
    status = hive_home.json("status")
    assert set(status) == {"state", "services", "endpoints", "executors", "public", "joined", "kills"}
    assert status["public"] is None and status["joined"] is None
    assert status["kills"] == []
    assert status["state"] == "ready"
    assert {one["name"] for one in status["services"]} == PROCESSES
    for one in status["services"]:
        assert set(one) == {"name", "state", "pid", "restarts"}
        assert one["state"] == "ready"
        assert psutil.pid_exists(one["pid"])
    assert set(status["endpoints"]) == {"http", "grpc", "nats", "postgres"}
    assert {one["name"] for one in status["executors"]} == {"executor-1", "executor-2"}
    for one in status["executors"]:
        assert set(one) == {"id", "name", "state", "slots", "running"}
        assert one["state"] == "online"
        assert one["slots"] >= 1


def test_the_squares_come_out_in_the_order_of_the_fork(hive_home: Installation, squares: Path) -> None:
    result = hive_home.json("run", str(squares), "--input", "numbers=[4,3,2,1]")
    assert set(result) == RUN_KEYS
    assert result["state"] == "succeeded"
    assert result["output"] == {"total": 30}
    assert result["tasks"] == {"total": 5, "succeeded": 5, "failed": 0, "cancelled": 0}
    assert result["attempts"] >= 5
    assert result["duration_ms"] > 0
    outputs = {
        task["index"]: task["output"]
        for task in hive_home.json("job", "show", result["job_id"])["tasks"]
        if task["step"] == "square"
    }
    assert outputs == {0: {"square": 16}, 1: {"square": 9}, 2: {"square": 4}, 3: {"square": 1}}


def test_events_are_lines_with_five_members_and_one_end_per_task(hive_home: Installation, squares: Path) -> None:
    job = hive_home.json("run", str(squares))["job_id"]
    events = hive_home.events(job)
    assert all(set(event) == {"position", "stream", "type", "ts_us", "data"} for event in events)
    positions = [event["position"] for event in events]
    assert positions == sorted(set(positions))
    assert events[0]["type"] == "JobSubmitted"
    assert events[0]["stream"] == job
    assert_exactly_once(events)


def test_the_log_verifies_here_and_from_an_export(hive_home: Installation, squares: Path, tmp_path: Path) -> None:
    hive_home.hive("run", str(squares))
    export = tmp_path / "log.ndjson"
    hive_home.hive("audit", "export", str(export))
    hive_home.hive("run", str(squares))
    for arguments in ((), ("--file", str(export)), ("--against", str(export))):
        result = hive_home.verify(*arguments)
        assert set(result) == {"ok", "events", "head", "first_bad_position", "reason"}
        assert result["ok"], result
        assert result["events"] == result["head"] > 0
        assert result["first_bad_position"] is None
    edited = tmp_path / "edited.ndjson"
    edited.write_bytes(export.read_bytes().replace(b"JobSubmitted", b"JobSubmittex", 1))
    done = hive_home.hive("audit", "verify", "--file", str(edited), "--json", check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["first_bad_position"] > 1


def test_a_new_agent_works_as_it_was_written(hive_home: Installation, tmp_path: Path) -> None:
    folder = tmp_path / "greeter"
    hive_home.hive("agent", "init", str(folder))
    tried = hive_home.json("agent", "run", str(folder), "--input-file", str(folder / "input.json"))
    assert tried["output"] == {"greeting": "Hello, World!"}
    assert [line["text"] for line in tried["log"]] == ["greeting World"]
    hive_home.hive("agent", "push", str(folder))
    hive_home.hive("agent", "push", str(folder))
    result = hive_home.json("run", str(folder / "job.yaml"), "--input", "name=Ada")
    assert result["output"] == {"greeting": "Hello, Ada!"}
    listed = hive_home.json("agent", "list", "greeter")["versions"]
    assert [(one["name"], one["version"]) for one in listed] == [("greeter", "1.0.0")]
    logs = hive_home.json("job", "logs", result["job_id"])["logs"]
    assert [line["text"] for entry in logs for line in entry["lines"]] == ["greeting Ada"]


def test_a_version_never_changes(hive_home: Installation, tmp_path: Path) -> None:
    folder = tmp_path / "fixed"
    hive_home.hive("agent", "init", str(folder))
    hive_home.hive("agent", "push", str(folder))
    (folder / "agent.py").write_text("def run(input: dict) -> dict:\n    return {}\n")
    done = hive_home.hive("agent", "push", str(folder), check=False)
    assert done.returncode == 2
    assert "fixed" in done.stderr
    assert "1.0.0" in done.stderr


def test_a_placement_can_be_explained(hive_home: Installation, squares: Path) -> None:
    job = hive_home.json("run", str(squares))["job_id"]
    task = hive_home.json("job", "show", job)["tasks"][0]["task_id"]
    explained = hive_home.json("job", "explain", task)
    assert {one["name"] for one in explained["candidates"]} == {"executor-1", "executor-2"}
    assert all(one["feasible"] or one["reason"] for one in explained["candidates"])


def test_a_drained_executor_gets_nothing_until_it_is_taken_back(hive_home: Installation, squares: Path) -> None:
    ids = {one["name"]: one["id"] for one in hive_home.json("status")["executors"]}
    hive_home.hive("executor", "drain", "executor-1")
    try:
        job = hive_home.json("run", str(squares), "--input", f"numbers={list(range(12))}")["job_id"]
        used = {e["data"]["executor"] for e in hive_home.events(job) if e["type"] == "TaskAssigned"}
        assert used == {ids["executor-2"]}
    finally:
        hive_home.hive("executor", "undrain", "executor-1")


def test_inputs_over_256_kib_travel_by_digest(hive_home: Installation, squares: Path, tmp_path: Path) -> None:
    file = tmp_path / "input.json"
    file.write_text(json.dumps({"numbers": [2], "ballast": "x" * 300_000}))
    result = hive_home.json("run", str(squares), "--input-file", str(file))
    assert result["output"] == {"total": 4}
    submitted = hive_home.events(result["job_id"])[0]["data"]
    assert submitted["input"]["digest"].startswith("sha256:")


def test_a_job_that_was_cancelled_ends_with_1(hive_home: Installation, tmp_path: Path) -> None:
    folder = tmp_path / "sleeper"
    hive_home.hive("agent", "init", str(folder))
    (folder / "agent.py").write_text(
        "import time\n\n\ndef run(input: dict) -> dict:\n    time.sleep(8)\n    return {}\n"
    )
    hive_home.hive("agent", "push", str(folder))
    job = hive_home.json("run", str(folder / "job.yaml"), "--detach")["job_id"]
    hive_home.hive("job", "cancel", job)
    done = hive_home.hive("job", "watch", job, "--json", check=False)
    assert done.returncode == 1
    assert json.loads(done.stdout)["state"] == "cancelled"
    assert_exactly_once(hive_home.events(job))


def test_the_key_is_private_and_everything_but_health_needs_it(
    hive_home: Installation, gateway: httpx.Client
) -> None:
    assert stat.S_IMODE((hive_home.home / "api-key").stat().st_mode) == 0o600
    with httpx.Client(base_url=gateway.base_url, trust_env=False) as stranger:
        assert stranger.get("/healthz").status_code == 200
        assert stranger.get("/v1/jobs").status_code == 401
        assert stranger.get("/v1/jobs", headers={"authorization": "Bearer wrong"}).status_code == 401
    assert gateway.get("/v1/jobs").status_code == 200


def test_prometheus_finds_every_process(hive_home: Installation) -> None:
    config = yaml.safe_load((hive_home.home / "prometheus.yml").read_text())
    targets = {
        entry["labels"]["process"]: entry["targets"][0]
        for job in config["scrape_configs"]
        for entry in job["static_configs"]
    }
    assert set(targets) == PROCESSES - {"postgres", "nats"}
    for name, target in targets.items():
        text = httpx.get(f"http://{target}/metrics", trust_env=False).text
        families = {family.name for family in text_string_to_metric_families(text)}
        assert MEASURED["executor" if name.startswith("executor") else name] <= families, name
        assert name in READS_LOG or not LOG & families, f"{name} follows no log, and shows a head"
        ready = httpx.get(f"http://{target}/readyz", trust_env=False)
        assert (ready.status_code, ready.json()["problems"]) == (200, {}), name


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": [{"id": "total", "agent": "nobody@1.0.0"}]}, ["nobody@1.0.0", "tasks[0].agent"]),
        ({"tasks": [{"id": "total", "agent": "square@9.9.9"}]}, ["square@9.9.9", "tasks[0].agent"]),
        (
            {"tasks": [{"id": "a", "agent": "square@1.0.0", "needs": ["b"], "input": {"n": 1}}]},
            ["tasks[0].needs", "b"],
        ),
        (
            {
                "tasks": [
                    {"id": "a", "agent": "square@1.0.0", "needs": ["b"], "input": {"n": 1}},
                    {"id": "b", "agent": "square@1.0.0", "needs": ["a"], "input": {"n": 1}},
                ]
            },
            ["tasks[0].needs", "a → b → a"],
        ),
        ({"input": {"numbers": 3}}, ["fork", "list"]),
        ({"limits": {"fan_out": 2}}, ["fan_out"]),
        ({"output": "${tasks.total.[}"}, ["output"]),
        ({"colour": "red"}, ["colour"]),
    ],
    ids=["agent", "version", "dangling", "cycle", "fork", "fan-out", "expression", "field"],
)
def test_a_bad_job_file_is_refused_before_anything_is_committed(
    change: dict[str, object],
    words: list[str],
    hive_home: Installation,
    gateway: httpx.Client,
    squares: Path,
    tmp_path: Path,
) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(squares.read_text()) | change))
    before = gateway.get("/v1/jobs?limit=1").json()
    done = hive_home.hive("run", str(file), "--json", check=False)
    assert done.returncode == 2, done.stderr
    assert "bad.yaml" in done.stderr
    for word in words:
        assert word in done.stderr
    assert gateway.get("/v1/jobs?limit=1").json() == before


def test_a_job_survives_the_restart_of_what_it_talks_to(hive_home: Installation, squares: Path) -> None:
    job = hive_home.start_job(squares, "--input", f"numbers={list(range(200))}")
    time.sleep(0.5)
    hive_home.kill(hive_home.pids()["gateway"])
    out, err = job.communicate(timeout=120)
    assert job.returncode == 0, err
    assert json.loads(out)["output"] == {"total": sum(n * n for n in range(200))}
    hive_home.wait_ready()
