"""Asking, granting and being refused, as a person sees it: on the command line, with agents that mean harm."""

from pathlib import Path
from random import Random
from typing import Any

import httpx
from hive_common.contracts.permissions import HttpPermission, KvPermission, ModelPermission, Permissions
from hive_common.testing.installation import Installation, wait_until
from hive_common.testing.permission_sets import Call, is_allowed

MANIFEST = """\
apiVersion: hive/v1
kind: Agent
name: {name}
version: {version}
runtime: python
entry: agent.py
resources: {{memory: 64Mi, timeout: 60s}}
permissions:
  model: {{names: [small, large], max_tokens: {tokens}}}
  http: {{hosts: ["127.0.0.1:7", "127.0.0.1:9", "[::1]:9"], methods: [GET, POST], private: true}}
  kv: {{namespace: {name}, quota: 1Ki}}
"""

# It catches whatever Python can catch, and goes on.
AGENT = """\
from hive import http, kv, model

def run(input):
    try:
        match input["permission"]:
            case "model":
                model.chat("hello", model=input["target"])
            case "http":
                http.request(input["how"], "https://" + input["target"] + "/")
            case "kv":
                kv.put("key", 1)
    except BaseException as error:
        return {"caught": getattr(error, "code", type(error).__name__)}
    return {"caught": ""}
"""
ALLOWED = Permissions(
    model=ModelPermission(("small",), 9), http=HttpPermission(("127.0.0.1:7", "[::1]:9")), kv=KvPermission("n", 1)
)
CALLS: list[Call] = [
    *(("model", name, "") for name in ("small", "large", "other")),
    *(
        ("http", host, how)
        for host in ("127.0.0.1:7", "[::1]:9", "127.0.0.1:9", "127.0.0.1:8")
        for how in ("GET", "POST")
    ),
    ("kv", "n", ""),
]


def published(home: Installation, folder: Path, name: str, version: str = "1.0.0", tokens: int = 9) -> str:
    agent = folder / f"{name}-{version}"
    agent.mkdir()
    (agent / "manifest.yaml").write_text(MANIFEST.format(name=name, version=version, tokens=tokens))
    (agent / "agent.py").write_text(AGENT)
    return home.hive("agent", "push", str(agent)).stdout


def job(name: str, call: Call, version: str = "1.0.0") -> dict[str, Any]:
    permission, target, how = call
    return {
        "apiVersion": "hive/v1",
        "kind": "Job",
        "name": "tries",
        "input": {"permission": permission, "target": target, "how": how},
        "tasks": [{"id": "tries", "agent": f"{name}@{version}", "input": "${input}"}],
        "output": "${tasks.tries.output}",
    }


def ended(gateway: httpx.Client, job_id: str) -> dict[str, Any]:
    found: dict[str, Any] = {}

    def has_ended() -> bool:
        found.update(gateway.get(f"/v1/jobs/{job_id}").json())
        return found["state"] in ("succeeded", "failed", "cancelled")

    wait_until(has_ended, 120, f"job {job_id} ended")
    return found


def granted(gateway: httpx.Client, name: str, permissions: dict[str, Any]) -> None:
    answer = gateway.post(f"/v1/agents/{name}/grants", json={"permissions": permissions})
    assert answer.status_code == 200, answer.text


def refused(gateway: httpx.Client, document: dict[str, Any]) -> dict[str, Any]:
    answer = gateway.post("/v1/jobs", json=document)
    assert answer.status_code == 403, answer.text
    problem: dict[str, Any] = answer.json()
    assert problem["code"] == "permission_denied"
    return problem


def test_a_person_grants_and_takes_back(hive_home: Installation, gateway: httpx.Client, tmp_path: Path) -> None:
    name, document = "asker", job("asker", ("kv", "n", ""))
    pushed = published(hive_home, tmp_path, name)
    assert f"hive agent grant {name} model http kv" in pushed
    assert refused(gateway, document)["remedy"] == f"hive agent grant {name} model http kv"
    said = hive_home.hive("agent", "grant", name, "model", "http", "kv").stdout
    assert "send what it knows to the language models small and large" in " ".join(said.split())
    done = ended(gateway, hive_home.submit(document))
    assert (done["state"], done["output"]) == ("succeeded", {"caught": ""})
    # A version that asks for no more needs no new decision, one that asks for more does.
    assert "asks for" not in published(hive_home, tmp_path, name, "1.0.1", tokens=8)
    assert ended(gateway, hive_home.submit(job(name, ("kv", "n", ""), "1.0.1")))["state"] == "succeeded"
    assert f"hive agent grant {name} model" in published(hive_home, tmp_path, name, "1.1.0", tokens=10)
    assert refused(gateway, job(name, ("kv", "n", ""), "1.1.0"))["remedy"] == f"hive agent grant {name} model"
    states = {one["permission"]: one["state"] for one in hive_home.json("agent", "grants", name)["grants"]}
    assert states == {"model": "stale", "http": "granted", "kv": "granted"}
    hive_home.hive("agent", "ungrant", name, "kv", "--reason", "enough")
    assert "`kv`" in refused(gateway, document)["detail"]


def test_bad_grants_say_the_path_and_what_would_be_right(hive_home: Installation, tmp_path: Path) -> None:
    published(hive_home, tmp_path, "wide")
    for arguments, says in (
        (("model", "--max-tokens", "10"), "permissions.model.max_tokens: is wider than what wide@1.0.0 asks for"),
        (("kv", "--until", "2020-01-01"), "until: lies in the past"),
    ):
        done = hive_home.hive("agent", "grant", "wide", *arguments, check=False)
        assert done.returncode == 2, done.stderr
        assert says in " ".join(done.stderr.split()), done.stderr
    assert {one["state"] for one in hive_home.json("agent", "grants", "wide")["grants"]} == {"asked"}


def test_of_random_calls_none_outside_the_grant_is_made(
    hive_home: Installation, gateway: httpx.Client, tmp_path: Path
) -> None:
    published(hive_home, tmp_path, "tries")
    narrowed = {"hosts": ["127.0.0.1:7", "[::1]:9"], "methods": ["GET"]}
    granted(gateway, "tries", {"model": {"names": ["small"]}, "http": narrowed, "kv": None})
    sample = Random(5).sample(CALLS, 9)
    assert {is_allowed(ALLOWED, call) for call in sample} == {True, False}
    jobs = [(call, hive_home.submit(job("tries", call))) for call in sample]
    for call, job_id in jobs:
        done = ended(gateway, job_id)
        if is_allowed(ALLOWED, call):
            # There are no such models, and nobody listens there: the guest is told, and goes on.
            assert done["state"] == "succeeded", (call, done)
        else:
            assert (done["state"], done["error"]["code"]) == ("failed", "permission_denied"), (call, done)
            assert f"`{call[0]}`" in done["error"]["message"]
