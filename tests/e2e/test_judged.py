"""A judged job on a running installation, as its owner looks at it: tree, decision, events, over every door."""

import json
from pathlib import Path
from typing import Any

import grpc
import httpx
import yaml
from hive_common.ops.config import read_secret
from hive_common.rpc.client import bearer
from hive_common.testing.installation import Installation
from hive_proto.jobs.v1 import jobs_pb2, jobs_pb2_grpc

JUDGED = {"TaskDecided", "StepJoined"}


def test_what_was_decided_is_seen_through_every_door(
    hive_home: Installation, gateway: httpx.Client, squares: Path
) -> None:
    document: dict[str, Any] = yaml.safe_load(squares.read_text())
    document["tasks"][0] |= {
        "speculate": {"replicas": 2, "distinct": "executor"},
        "verify": {"quorum": {"k": 2, "of": 2}},
        "join": {"vote": {"equal": "json"}},
    }
    document |= {
        "tasks": document["tasks"][:1],
        "output": "${tasks.square.output}",
        "input": {"numbers": [3, -3, 2]},
    }
    job = hive_home.submit(document)
    stream = gateway.get(f"/v1/jobs/{job}/stream", timeout=60).text.splitlines()
    ended = gateway.get(f"/v1/jobs/{job}").json()
    assert (ended["state"], ended["output"], ended["tasks"]["total"]) == ("succeeded", {"square": 9}, 3)

    tree = hive_home.hive("job", "tree", job).stdout
    assert "★ winner" in tree and "executor-1" in tree and "executor-2" in tree
    assert "rule: 2 of 2 results that are the same JSON, one vote for each executor" in tree
    assert "joined by vote: [0] won with 2 votes" in tree

    shown = hive_home.json("job", "show", job)
    assert [task["decision"]["outcome"] for task in shown["tasks"]] == ["decided"] * 3
    assert [join["kind"] for join in shown["joins"]] == ["vote"]
    task = shown["tasks"][0]["task_id"]

    told = hive_home.json("job", "decision", task)
    assert {one["name"] for one in told["candidates"]} == {"executor-1", "executor-2"}
    assert gateway.get(f"/v1/tasks/{task}/decision").json() == told
    config = json.loads((hive_home.home / "hive.json").read_text())
    with grpc.insecure_channel(config["endpoints"]["grpc"]) as channel:
        metadata = bearer(read_secret(hive_home.home / "api-key"))
        stub = jobs_pb2_grpc.JobsStub(channel)
        answer = stub.GetDecision(jobs_pb2.GetDecisionRequest(task_id=task), metadata=metadata, timeout=20)
        assert json.loads(answer.decision_json) == told
        watched = [*stub.Watch(jobs_pb2.WatchRequest(job_id=job), metadata=metadata, timeout=20)]

    pages = gateway.get(f"/v1/jobs/{job}/events").json()["events"]
    written = [(one["position"], one["type"], one["data"]) for one in pages]
    assert [kind for _, kind, _ in written if kind in JUDGED] == ["TaskDecided"] * 3 + ["StepJoined"]
    assert [(one.position, one.type, json.loads(one.data_json)) for one in watched] == written
    sent = [json.loads(line.removeprefix("data: ")) for line in stream if line.startswith("data: {")]
    assert [(one["position"], one["type"], one["data"]) for one in sent] == written


def test_a_job_that_lacks_a_machine_says_which(
    hive_home: Installation, gateway: httpx.Client, squares: Path
) -> None:
    document: dict[str, Any] = yaml.safe_load(squares.read_text())
    words = {"speculate": {"distinct": "executor"}, "verify": {"quorum": {"k": 2, "of": 2}}}
    document |= {"tasks": [document["tasks"][0] | words], "output": None, "input": {"numbers": [3]}}
    drained = gateway.post("/v1/executors/executor-2/drain", json={"reason": "it is needed elsewhere"})
    assert drained.status_code == 200
    try:
        job = hive_home.submit(document)
        (waits,) = gateway.get(f"/v1/jobs/{job}/tasks").json()["tasks"]
        said = "waits for a second executor: 1 of 2 that may run it is there (executor-2 is drained)"
        assert waits["waits_for"] == said
        assert f"square[0] {said}" in " ".join(hive_home.hive("job", "show", job).stdout.split())
    finally:
        gateway.post("/v1/executors/executor-2/undrain")
    gateway.get(f"/v1/jobs/{job}/stream", timeout=60)
    assert gateway.get(f"/v1/jobs/{job}").json()["state"] == "succeeded"
