"""Executors that say which machine they are on: results of distinct devices, on an installation of a user."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from hive_common.testing.installation import Installation

# A whole installation: what executors say of their machine comes from their configuration, at the start.
pytestmark = pytest.mark.timeout(300)

SQUARE = Path(__file__).parents[2] / "examples" / "squares" / "square"


@pytest.fixture(scope="module")
def fleet() -> Iterator[Installation]:
    """Two executors on this machine, and one that says it is on another."""
    made = Installation(Path(tempfile.mkdtemp(prefix="hive-devices-")))
    try:
        made.hive("init", "--free-ports", "--executors", "3")
        file = made.home / "hive.json"
        settings = json.loads(file.read_text())
        settings["executors"][2] |= {"device": "laptop", "tier": "core"}
        file.write_text(json.dumps(settings))
        made.hive("up", "--detach", "--executors", "3", "--label", "room=attic")
        made.hive("agent", "push", str(SQUARE))
        yield made
    finally:
        made.hive("down", check=False)
        shutil.rmtree(made.home, ignore_errors=True)


def job(of: int) -> dict[str, object]:
    task = {
        "id": "square",
        "agent": "square@1.0.0",
        "input": {"n": 12},
        "verify": {"quorum": {"k": 2, "of": of}},
        "place": {"labels": {"room": "attic"}},
    }
    return {"apiVersion": "hive/v1", "kind": "Job", "name": "devices", "tasks": [task]}


def test_results_of_distinct_devices_are_of_distinct_machines(fleet: Installation, tmp_path: Path) -> None:
    found = {one["name"]: one["capabilities"] for one in fleet.get("/v1/executors")["executors"]}
    here = found["executor-1"]["device"]
    assert here == found["executor-2"]["device"] != ""
    assert (found["executor-3"]["device"], found["executor-3"]["tier"]) == ("laptop", "core")
    shown = fleet.hive("executor", "show", "executor-3").stdout
    assert "laptop" in shown
    assert "room=attic" in shown

    file = tmp_path / "job.json"
    file.write_text(json.dumps(job(3)))
    refused = fleet.hive("run", str(file), check=False)
    assert refused.returncode == 2
    assert "tasks[0].verify.quorum.of" in refused.stderr
    assert "3 distinct devices, and there are 2" in refused.stderr
    file.write_text(json.dumps(job(2)))
    done = fleet.json("run", str(file))
    events = fleet.events(done["job_id"])
    assigned = [event["data"] for event in events if event["type"] == "TaskAssigned"]
    assert {one["device"] for one in assigned} == {here, "laptop"}
    (decided,) = [event["data"]["decision"] for event in events if event["type"] == "TaskDecided"]
    assert {one["device"] for one in decided["candidates"]} == {here, "laptop"}
    audited = fleet.json("audit", "verify", "--decision", decided["task"])
    assert audited["counts"] == {"same": 1, "differs": 0, "not_checkable": 0}
    assert audited["checks"][0]["reasons"] == []
    assert "1 decision: 1 same" in fleet.hive("audit", "verify", "--decisions", done["job_id"]).stdout
    assert fleet.hive("audit", "verify", "--decision", done["job_id"], check=False).returncode == 2
