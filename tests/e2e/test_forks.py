"""Agents that fork tasks for other agents: what a person sees of it, and one account for all that they spend."""

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from hive_common.testing.installation import Installation, assert_exactly_once, wait_until
from hive_common.testing.scripted import Script, ScriptedModel, ScriptedProcess

# Whole installations, and the Python of their agents where that was never built before.
pytestmark = pytest.mark.timeout(300)

SQUARE = Path(__file__).parents[2] / "examples" / "squares" / "square"
PLAN = """\
from hive import fork

def run(input):
    return {"forked": fork("square", [{"n": n} for n in range(input["count"])])}
"""
SPLIT = """\
from hive import fork

def run(input):
    fork("asker", [{}] * input["count"])
    return {}
"""
ASKER = """\
import random
from hive import ModelError, model

def run(input):
    try:
        model.chat("hello", model="big", max_tokens=10)
    except ModelError as error:
        if error.code != "budget_exhausted":
            raise
        return {"paid": False}
    if random.random() < 0.3:
        raise RuntimeError("an attempt that has paid, and is made again")
    return {"paid": True}
"""
MODEL = 'model: {names: ["*"], max_tokens: 10}'
COST = 3_000 + 10 * 15_000
"""Of a call, in nano-USD: a token in, ten out."""
CALLS = 50
"""That the budget allows."""
TASKS = 10
CHILDREN = 20


def write_agent(folder: Path, name: str, code: str, *permissions: str) -> str:
    """Write an agent, and return its folder."""
    (folder / name).mkdir()
    asked = "".join(f"\n  {one}" for one in permissions)
    head = f"apiVersion: hive/v1\nkind: Agent\nname: {name}\nversion: 1.0.0\nruntime: python\nentry: agent.py\n"
    (folder / name / "manifest.yaml").write_text(f"{head}permissions: {asked or '{}'}\n")
    (folder / name / "agent.py").write_text(code)
    return str(folder / name)


def test_a_person_sees_what_an_agent_forked(hive_home: Installation, tmp_path: Path) -> None:
    plan = write_agent(tmp_path, "plan", PLAN, "fork: {agents: [square], max: 3}")
    hive_home.hive("agent", "push", str(SQUARE), plan)
    step = {"id": "plan", "agent": "plan@1.0.0", "input": "${input}"}
    job = {"apiVersion": "hive/v1", "kind": "Job", "name": "forks", "tasks": [step], "input": {"count": 3}}
    (tmp_path / "job.json").write_text(json.dumps(job | {"output": "${tasks.plan.forked[].output.square}"}))
    refused = hive_home.hive("run", str(tmp_path / "job.json"), check=False)
    assert refused.returncode != 0 and "hive agent grant plan fork" in " ".join(refused.stderr.split())
    granted = hive_home.hive("agent", "grant", "plan", "fork").stdout
    assert "start up to 3 tasks of square" in " ".join(granted.split())
    result = hive_home.json("run", str(tmp_path / "job.json"))
    assert result["output"] == [0, 1, 4]
    parent, *children = hive_home.get(f"/v1/jobs/{result['job_id']}/tasks")["tasks"]
    assert [(one["agent"], one["index"]) for one in children] == [("square@1.0.0", n) for n in range(3)]
    assert {one["parent"] for one in children} == {parent["task_id"]} and parent["parent"] is None
    assert "  [2] square@1.0.0" in hive_home.hive("job", "show", result["job_id"]).stdout
    assert_exactly_once(hive_home.events(result["job_id"]))
    more = hive_home.submit(job | {"input": {"count": 4}})
    wait_until(lambda: hive_home.get(f"/v1/jobs/{more}")["state"] != "running", 60, "the other job has ended")
    error = hive_home.get(f"/v1/jobs/{more}")["error"]
    assert error["code"] == "permission_denied"
    assert "`fork` is granted for 3 children" in error["message"]


@pytest.fixture
def acme(tmp_path: Path) -> Iterator[ScriptedProcess]:
    script = Script(models=(ScriptedModel(name="big-1"),), tokens=10, api_key="secret")
    with ScriptedProcess(tmp_path, script) as provider:
        yield provider


@pytest.fixture
def paid(acme: ScriptedProcess) -> Iterator[Installation]:
    """An installation with a provider."""
    made = Installation(Path(tempfile.mkdtemp(prefix="hive-forks-")))
    made.hive("init", "--free-ports", "--executors", "2")
    key = made.home / "secrets" / "acme"
    key.touch(mode=0o600)
    key.write_text("secret")
    file = made.home / "hive.json"
    model = {"name": "big-1", "aliases": ["big"], "input_usd": 3, "output_usd": 15, "context_tokens": 4_096}
    one = {"name": "acme", "base_url": f"{acme.url}/v1", "key_file": "secrets/acme", "models": [model]}
    settings = json.loads(file.read_text())
    settings["models"]["urls"] = []
    file.write_text(json.dumps(settings | {"providers": [one]}))
    try:
        made.up(executors=2)
        yield made
    finally:
        made.hive("down", check=False)
        shutil.rmtree(made.home, ignore_errors=True)


# The numbers of the issue; a task takes a moment, 200 and their retries take some.
def test_200_forked_tasks_and_their_retries_spend_no_more_than_the_budget_of_their_job(
    paid: Installation, acme: ScriptedProcess, tmp_path: Path
) -> None:
    split = write_agent(tmp_path, "split", SPLIT, f"fork: {{agents: [asker], max: {CHILDREN}}}", MODEL)
    paid.hive("agent", "push", split, write_agent(tmp_path, "asker", ASKER, MODEL), "--grant")
    usd = f"usd={CALLS * COST / 1e9}/month"
    secret = paid.json("key", "create", "ci", "--cloud", "--budget", usd)["secret"]
    step = {
        "id": "ask",
        "agent": "split@1.0.0",
        "fork": list(range(TASKS)),
        "input": {"count": CHILDREN},
        "retry": {"max_attempts": 50, "backoff": "1ms"},
    }
    job = {"apiVersion": "hive/v1", "kind": "Job", "name": "spend", "tasks": [step]}
    job_id = paid.submit(job | {"output": "${tasks.ask.forked[].output.paid}"}, key=secret)
    wait_until(lambda: paid.get(f"/v1/jobs/{job_id}")["state"] != "running", 250, "the job has ended")
    done = paid.get(f"/v1/jobs/{job_id}")
    assert done["state"] == "succeeded", done.get("error")
    paid_for = Counter(done["output"])
    assert paid_for.total() == TASKS * CHILDREN and done["attempts"] > done["tasks"]["total"]
    calls = acme.counts.tokens // 10
    assert paid_for[True] < calls <= CALLS
    # A call is refused while others hold more than they will have spent: a few at the end.
    assert calls > CALLS // 2
    assert calls <= CALLS

    def used() -> int:
        rows = paid.json("model", "usage", "--by", "job")["rows"]
        return sum(row["nano_usd"] for row in rows if row["name"] == job_id)

    # The router writes down a moment after it has answered.
    wait_until(lambda: used() == calls * COST, 60, "every call is in the account of the job")
    (state,) = paid.json("model", "budget", "show", "--key", "ci")["budgets"][0]["limits"]
    assert (state["spent"], state["unaccounted"]) == (calls * COST, 0)
