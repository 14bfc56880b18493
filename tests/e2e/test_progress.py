"""An agent that says how far it is, and one that does not: who gets a second attempt beside it."""

import urllib.request
from pathlib import Path
from typing import Any

import httpx
import yaml
from hive_common.testing.installation import Installation, wait_until

AGENT = """\
import time
from hive import progress

def run(input):
    for fraction in input["says"]:
        progress(fraction)
        time.sleep(1)  # of two while a report is under way, only the newer one is told
    time.sleep(300)
    return {}
"""
MANIFEST = """\
apiVersion: hive/v1
kind: Agent
name: marks-progress
version: 1.0.0
runtime: python
entry: agent.py
resources: {timeout: 10m}
"""


def marks(home: Path) -> float:
    """Return how many reports of progress the scheduler has taken note of."""
    jobs = yaml.safe_load((home / "prometheus.yml").read_text())["scrape_configs"]
    (target,) = (
        entry["targets"][0]
        for job in jobs
        for entry in job["static_configs"]
        if entry["labels"]["process"] == "scheduler"
    )
    with urllib.request.urlopen(f"http://{target}/metrics", timeout=30) as answer:
        (line,) = (
            one for one in answer.read().decode().splitlines() if one.startswith("hive_progress_marks_total ")
        )
    return float(line.split()[1])


def test_what_a_guest_says_reaches_the_leader_and_who_says_nothing_gets_a_second_attempt(
    hive_home: Installation, gateway: httpx.Client, tmp_path: Path
) -> None:
    (tmp_path / "manifest.yaml").write_text(MANIFEST)
    (tmp_path / "agent.py").write_text(AGENT)
    hive_home.hive("agent", "push", str(tmp_path))

    def job(says: list[float], within: str) -> str:
        words = {"replicas": 2, "distinct": "none", "hedge_after": {"progress": 0.1, "within": within}}
        task: dict[str, Any] = {
            "id": "tell",
            "agent": "marks-progress@1.0.0",
            "input": {"says": says},
            "speculate": words,
        }
        return hive_home.submit({"apiVersion": "hive/v1", "kind": "Job", "name": "marks-progress", "tasks": [task]})

    def hedged(job_id: str) -> list[str]:
        events = hive_home.get(f"/v1/jobs/{job_id}/events")["events"]
        return [one["data"]["reason"] for one in events if one["type"] == "TaskExtended"]

    before = marks(hive_home.home)
    tells = job([0.05, 0.1], "10m")
    wait_until(lambda: marks(hive_home.home) == before + 2, 60, "both marks are known")
    silent = job([], "100ms")
    wait_until(lambda: hedged(silent), 60, "the silent one has a second attempt planned")
    assert (hedged(silent), hedged(tells)) == (["hedge"], [])
    for one in (tells, silent):
        assert gateway.delete(f"/v1/jobs/{one}").status_code == 202
