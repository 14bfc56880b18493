"""Keys, providers and budgets, as a person sees them: on the command line, with a provider that really answers."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hive_common.testing.installation import Installation, wait_until
from hive_common.testing.scripted import Script, ScriptedModel, ScriptedProcess

# A whole installation, and the Python of its agents where that was never built before.
pytestmark = pytest.mark.timeout(300)

MANIFEST = """\
apiVersion: hive/v1
kind: Agent
name: asker
version: 1.0.0
runtime: python
entry: agent.py
resources: {memory: 64Mi, timeout: 60s}
permissions:
  model: {names: ["*"], max_tokens: 20}
"""
AGENT = """\
from hive import model

def run(input):
    return {"said": model.chat("hello", model=input.get("model", "big")).text}
"""
JOB = {
    "apiVersion": "hive/v1",
    "kind": "Job",
    "name": "ask",
    "tasks": [{"id": "ask", "agent": "asker@1.0.0", "input": {}}],
    "output": "${tasks.ask.output}",
}
BODY = {"model": "big", "max_tokens": 10, "messages": [{"role": "user", "content": "hello"}]}
COST = 3_000 + 10 * 15_000
"""Of such a call, in nano-USD: a token in, ten out."""


@pytest.fixture
def acme(tmp_path: Path) -> Iterator[ScriptedProcess]:
    script = Script(models=(ScriptedModel(name="big-1"),), tokens=10, api_key="secret")
    with ScriptedProcess(tmp_path, script) as provider:
        yield provider


@pytest.fixture
def small(tmp_path: Path) -> Iterator[ScriptedProcess]:
    folder = tmp_path / "small"
    folder.mkdir()
    with ScriptedProcess(folder, Script(models=(ScriptedModel(name="small"),), tokens=10)) as server:
        yield server


@pytest.fixture
def paid(acme: ScriptedProcess, small: ScriptedProcess) -> Iterator[Installation]:
    """An installation with a provider, and with a model of its own."""
    made = Installation(Path(tempfile.mkdtemp(prefix="hive-money-")))
    made.hive("init", "--free-ports", "--executors", "1")
    key = made.home / "secrets" / "acme"
    key.touch(mode=0o600)
    key.write_text("secret")
    file = made.home / "hive.json"
    model = {"name": "big-1", "aliases": ["big"], "input_usd": 3, "context_tokens": 4_096}
    one = {"name": "acme", "base_url": f"{acme.url}/v1", "key_file": "secrets/acme", "models": [model]}
    settings = json.loads(file.read_text())
    settings["models"]["urls"] = [small.url]
    file.write_text(json.dumps(settings | {"providers": [one]}))
    try:
        refused = made.hive("up", "--detach", check=False)
        assert refused.returncode != 0
        assert "providers[0].models[0].output_usd: is missing" in " ".join(refused.stderr.split())
        model["output_usd"] = 15
        file.write_text(json.dumps(settings | {"providers": [one]}))
        made.up(executors=1)
        yield made
    finally:
        made.hive("down", check=False)
        shutil.rmtree(made.home, ignore_errors=True)


def test_a_key_spends_what_its_budget_allows(paid: Installation, acme: ScriptedProcess, tmp_path: Path) -> None:
    url = json.loads((paid.home / "hive.json").read_text())["endpoints"]["http"]

    def ask(secret: str, path: str = "/v1/chat/completions", body: dict[str, Any] = BODY) -> httpx.Response:
        headers = {"authorization": f"Bearer {secret}"}
        return httpx.post(url + path, json=body, headers=headers, timeout=60, trust_env=False)

    plain = paid.json("key", "create", "plain")["secret"]
    assert ask(plain).status_code == 403
    budget = ("--cloud", "--budget", "usd=0.002/month")
    secret = paid.json("key", "create", "ci", *budget)["secret"]
    answered = ask(secret)
    assert (answered.status_code, answered.headers["x-hive-route"]) == (200, "cloud")
    refused = ask(secret, body=BODY | {"max_tokens": 4_000})
    assert refused.status_code == 402
    assert "key `ci` has spent $0.000153 of $0.002 this month (UTC)" in refused.json()["error"]["message"]
    assert ask(secret, "/v1/keys", {"name": "mine"}).status_code == 403

    # A guest spends on the account of the key that submitted its job.
    agent = tmp_path / "asker"
    agent.mkdir()
    (agent / "manifest.yaml").write_text(MANIFEST)
    (agent / "agent.py").write_text(AGENT)
    paid.hive("agent", "push", str(agent), "--grant")
    job = ask(secret, "/v1/jobs", JOB).json()["job_id"]
    paid.hive("job", "watch", job)
    assert paid.get(f"/v1/jobs/{job}")["output"] == {"said": "0 1 2 3 4 5 6 7 8 9 "}

    def used(by: str, name: str) -> int:
        rows = paid.json("model", "usage", "--by", by)["rows"]
        return sum(row["nano_usd"] for row in rows if row["name"] == name)

    # The router writes down a moment after it has answered.
    wait_until(lambda: used("key", "ci") == 2 * COST, 60, "both calls are in the account of the key")
    assert {row["name"]: row["nano_usd"] for row in paid.json("model", "usage", "--by", "job")["rows"]}[job] == COST
    (state,) = paid.json("model", "budget", "show", "--key", "ci")["budgets"][0]["limits"]
    assert (state["spent"], state["unaccounted"]) == (2 * COST, 0)
    assert acme.counts.tokens == 20

    # What the job itself may spend holds beside that, and what it says is not tried again.
    tasks = [{**JOB["tasks"][0], "retry": {"max_attempts": 3, "backoff": "1ms"}}]
    bounded = ask(secret, "/v1/jobs", {**JOB, "tasks": tasks, "limits": {"budget": {"usd": 0.0004}}}).json()[
        "job_id"
    ]
    paid.hive("job", "watch", bounded, check=False)
    ended = paid.get(f"/v1/jobs/{bounded}")
    assert (ended["state"], ended["error"]["code"], ended["attempts"]) == ("failed", "budget_exhausted", 1)
    assert f"job `{bounded}` has spent $0.00 of $0.0004 so far" in ended["error"]["message"]
    assert f"hive model budget set --job {bounded} --usd AMOUNT --per ever" in ended["error"]["message"]
    assert ask(secret, "/v1/jobs", {**JOB, "limits": {"budget": {}}}).json()["path"] == "limits.budget"
    refused = "1 model calls, 0 of them core, 0 tokens, $0.00"
    wait_until(
        lambda: refused in paid.hive("job", "show", bounded).stdout, 60, "the call that was refused is shown"
    )
    assert "budget: $0.00 of $0.0004" in paid.hive("job", "show", bounded).stdout
    # Tokens count where they cost nothing as well, also where the device has the model itself.
    for tokens, state in ((200, "succeeded"), (20, "failed")):
        task = {**tasks[0], "input": {"model": "small"}, "budget": {"tokens": tokens}}
        free = ask(secret, "/v1/jobs", {**JOB, "tasks": [task]}).json()["job_id"]
        paid.hive("job", "watch", free, check=False)
        ended = paid.get(f"/v1/jobs/{free}")
        assert (ended["state"], ended["attempts"]) == (state, 1), ended.get("error")
    assert ended["error"]["code"] == "budget_exhausted"
    assert f"task `{ended['error']['task']}` has spent 0 tokens of 20 tokens so far" in ended["error"]["message"]
    # A provider has answered the first one: a core call.
    assert paid.json("job", "show", job)["model_usage"]["used"]["core"] == 1
    assert acme.counts.tokens == 20

    paid.hive("key", "revoke", "ci")
    assert ask(secret).status_code == 401
    assert acme.counts.tokens == 20
