"""Two keys and an owner over REST: every path about a job, for whoever did not submit it."""

from pathlib import Path

import httpx
import pytest
import yaml
from hive_common.testing.installation import Installation, wait_until

ABOUT_A_JOB = ("{job_id}", "{task_id}")


@pytest.fixture(scope="module")
def ada(hive_home: Installation) -> dict[str, str]:
    return shows(hive_home, "sees-ada")


@pytest.fixture(scope="module")
def bob(hive_home: Installation) -> dict[str, str]:
    return shows(hive_home, "sees-bob")


def shows(home: Installation, name: str) -> dict[str, str]:
    return {"authorization": f"Bearer {home.json('key', 'create', name)['secret']}"}


def test_of_a_job_of_another_key_nothing_is_there(
    gateway: httpx.Client, squares: Path, ada: dict[str, str], bob: dict[str, str]
) -> None:
    document = yaml.safe_load(squares.read_text()) | {"input": {"numbers": [1, 2]}}
    job = gateway.post("/v1/jobs", json=document, headers=ada).json()["job_id"]
    wait_until(lambda: gateway.get(f"/v1/jobs/{job}", headers=ada).json()["state"] == "succeeded", 120, "it ended")
    tasks = gateway.get(f"/v1/jobs/{job}/tasks", headers=ada).json()["tasks"]
    names = {"job_id": job, "task_id": tasks[0]["task_id"]}
    paths = gateway.get("/openapi.json").json()["paths"]
    about = [
        (method.upper(), template.format(**names))
        for template, item in paths.items()
        if any(part in template for part in ABOUT_A_JOB)
        for method in item
    ]
    assert len(about) >= 9
    for method, path in about:
        assert gateway.request(method, path, headers=bob).status_code == 404, (method, path)
    for who in (ada, {}):
        for method, path in about:
            answer = gateway.request(method, path, headers=who)
            # Nothing was judged, which nobody else is told either.
            assert (answer.status_code == 409) if path.endswith("/decision") else answer.is_success, (method, path)

    def listed(who: dict[str, str]) -> list[str]:
        return [one["job_id"] for one in gateway.get("/v1/jobs", headers=who).json()["jobs"]]

    assert listed(ada) == [job]
    assert listed(bob) == []
    assert job in listed({})
