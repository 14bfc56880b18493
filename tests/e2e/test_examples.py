"""The examples that judge, as a user runs them: one command each, on this installation or on a scratch one."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from hive_common.testing.installation import Installation

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"
SECONDS_MAX = 200.0


def run_example(script: str, home: Installation, *arguments: str) -> tuple[dict[str, Any], str]:
    """Run an example with --json; return its document, and what it showed."""
    command = [sys.executable, str(EXAMPLES / script), "--home", str(home.home), "--json", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS_MAX, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}\n{home.logs()}"
    document: dict[str, Any] = json.loads(done.stdout)
    return document, done.stderr


def recomputed(home: Installation, job: str) -> list[str]:
    """Recompute what was decided over a job from the log, values included; return how each thing was decided."""
    found = home.json("audit", "verify", "--decisions", job)
    assert found["ok"] and {check["result"] for check in found["checks"]} == {"same"}, found
    return sorted(check["outcome"] for check in found["checks"])


@pytest.mark.timeout(240)
class TestWithoutModel:
    def test_map_reduce_indexes_what_two_executors_agree_on(self, hive_home: Installation) -> None:
        result, shown = run_example("map-reduce/run.py", hive_home, "examples/*/*/*.py")
        index = result["output"]
        assert index["files"] == len(list(EXAMPLES.glob("*/*/*.py")))
        assert {"name": "run", "places": index["files"] - 1} in index["most_defined"], "all but measures.py"
        decision = hive_home.get(f"/v1/tasks/{result['decided']}/decision")
        assert decision["rule"]["distinct"] == "executor" and decision["votes"] == [1, 2]
        assert len({one["executor"] for one in decision["candidates"]}) == 2
        assert decision["candidates"][0]["digest"] == decision["candidates"][1]["digest"]
        assert recomputed(hive_home, result["job_id"]) == ["decided", "joined"]
        assert "integrator index-reducer@1.0.0" in shown and "decided: #1 with 2 votes" in shown

    def test_critics_have_to_agree_on_what_they_drop(self, hive_home: Installation) -> None:
        result, shown = run_example("code-review/demo.py", hive_home, "examples/**/*.py")
        assert len(result["output"]["dropped"]) == 3 and "dropped the 3 planted findings and nothing else" in shown
        decision = hive_home.get(f"/v1/tasks/{result['decided']}/decision")
        assert decision["step"] == "criticise" and len(decision["votes"]) == 2
        tasks = hive_home.get(f"/v1/jobs/{result['job_id']}/tasks", limit=1000)["tasks"]
        (report,) = (task for task in tasks if task["step"] == "report" and task["judging"] is None)
        assert hive_home.get(f"/v1/tasks/{report['task_id']}/decision")["candidates"][0]["score"] == 1

    def test_ctrl_c_leaves_nothing_behind(self) -> None:
        command = [sys.executable, str(EXAMPLES / "map-reduce" / "run.py"), "examples/*/*/*.py"]
        with tempfile.TemporaryDirectory(prefix="hive-x-") as folder:
            # A session of its own is what a terminal gives: its Ctrl-C reaches the example and its commands.
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env={**os.environ, "TMPDIR": folder},
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                # Who starts tests in the background has them ignore what a terminal does not.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
            assert process.stdout is not None
            said = []
            for line in process.stdout:
                said.append(line)
                if "is ready after" in line:  # agents are pushed, and then the job comes
                    break
            os.killpg(process.pid, signal.SIGINT)
            rest, _ = process.communicate(timeout=SECONDS_MAX)
            assert process.returncode == 130, "".join(said) + rest
            assert list(Path(folder).glob("hive-example-*")) == []
            left = [one.cmdline() for one in psutil.process_iter() if folder in " ".join(_cmdline(one))]
            assert left == []

    def test_a_pattern_that_fits_nothing_is_said_before_anything_starts(self) -> None:
        command = [sys.executable, str(EXAMPLES / "map-reduce" / "run.py"), "nothing/*.here"]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1 and "no file fits nothing/*.here" in done.stderr


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.fixture(scope="class")
def with_model() -> Iterator[Installation]:
    """An installation that serves the small model."""
    pytest.importorskip("xllamacpp", reason="needs the extra `model`: make setup installs it")
    home = Path(tempfile.mkdtemp(prefix="hive-examples-"))
    made = Installation(home)
    try:
        made.hive("init", "--free-ports", "--executors", "2")
        made.hive("up", "--detach", "--with-model", "--executors", "2")
        yield made
    finally:
        made.hive("down", check=False)
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.slow
@pytest.mark.timeout(240)
class TestWithTheSmallModel:
    """What it says is chance; that votes are counted, quotes are verbatim and decisions hold is not."""

    def test_samples_vote(self, with_model: Installation) -> None:
        question = "A farmer packs 7 eggs in each of 5 boxes. How many eggs does he pack?"
        result, shown = run_example("self-consistency/run.py", with_model, question)
        decision = with_model.get(f"/v1/tasks/{result['decided']}/decision")
        assert decision["outcome"] == "kept" and decision["rule"]["distinct"] == "none"
        assert len(decision["candidates"]) + decision["spent"] == 7, "each sample counts, or has failed"
        assert isinstance(result["output"]["answer"], int | float) and str(result["output"]["answer"]) in shown
        assert recomputed(with_model, result["job_id"]) == ["joined", "kept"]

    def test_answers_are_compared_by_vectors(self, with_model: Installation) -> None:
        folder = EXAMPLES / "same-meaning"
        with_model.hive("agent", "push", "--grant", str(folder / "teller"), str(folder / "meaning"))
        # Of this model any two texts are that near: how near is chance, and that they are compared is not.
        said = (folder / "job.yaml").read_text()
        job = with_model.home / "same-meaning.yaml"
        job.write_text(said.replace("min: 0.9", "min: -1").replace("of: 3", "of: 2"))
        result = with_model.json("run", str(job))
        tasks = with_model.get(f"/v1/jobs/{result['job_id']}/tasks")["tasks"]
        (told,) = (task for task in tasks if task["judging"] is None)
        decision = with_model.get(f"/v1/tasks/{told['task_id']}/decision")
        assert decision["outcome"] == "decided" and decision["votes"] == [1, 2]
        assert [one["agent"] for one in decision["judges"]] == ["meaning@1.0.0"] * len(decision["judges"])
        same = decision["candidates"][0]["digest"] == decision["candidates"][1]["digest"]
        assert same or sorted(one["judged"] for one in decision["judges"]) == [[1], [2]]
        assert recomputed(with_model, result["job_id"]) == ["decided"]

    def test_quotes_stand_in_the_documents_that_are_named(self, with_model: Installation) -> None:
        question = "What happens to guests without a lease?"
        result, shown = run_example(
            "research/run.py", with_model, question, "docs/adr/0004-*.md", "docs/adr/0016-*.md", "--readings", "2"
        )
        readings = {reading["path"]: reading["text"] for reading in result["output"]["readings"]}
        assert len(readings) == 2
        for note in result["output"]["found"]["notes"]:
            assert note["quote"] in readings[note["path"]] and note["score"] >= 0.35
            document = " ".join((ROOT / note["path"]).read_text().split())
            assert note["quote"] in document
        passed = len(result["output"]["found"]["notes"])
        assert recomputed(with_model, result["job_id"]) == passed * ["decided"] + (2 - passed) * ["failed"] + [
            "joined"
        ]
        assert question in shown and "research-critic@1.0.0" in shown


@pytest.fixture
def agent_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that loads an agent's module as it is, with a `hive` whose log goes nowhere."""
    hive = types.ModuleType("hive")
    hive.__dict__.update(log=types.SimpleNamespace(info=lambda _: None, warning=lambda _: None), model=None)
    monkeypatch.setitem(sys.modules, "hive", hive)

    def load(name: str) -> Any:
        spec = importlib.util.spec_from_file_location("agent_under_test", EXAMPLES / name / "agent.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    return load


class TestAgents:
    PASSAGE = "The lease is 6 seconds. Without a lease guests stand still. Nobody waits for them."
    TERMS: dict[str, float] = {"leas": 3.0, "guest": 2.0}  # noqa: RUF012

    def judged(self, agent_of: Any, said: str, quote: str) -> dict[str, Any]:
        asked = {"text": self.PASSAGE, "question": "What do guests do without a lease?", "terms": self.TERMS}
        score: dict[str, Any] = agent_of("research/critic").run(
            {"input": asked, "output": {"said": said, "quote": quote}}
        )
        return score

    def test_the_critic_lets_pass_what_is_quoted_and_about_the_question(self, agent_of: Any) -> None:
        quote = "Without a lease guests stand still."
        assert self.judged(agent_of, quote, quote)["score"] == 1.0

    @pytest.mark.parametrize(
        ("said", "quote"),
        [
            ("Without a lease guests stand still.", "Without a lease guests run on."),
            ("A tenant signs a contract with the landlord of a flat.", "Without a lease guests stand still."),
            ("Nobody waits for them.", "Nobody waits for them."),
            ("", ""),
        ],
        ids=["quote-not-there", "invented", "not-about-it", "nothing"],
    )
    def test_the_critic_refuses(self, agent_of: Any, said: str, quote: str) -> None:
        assert self.judged(agent_of, said, quote)["score"] < 0.35

    def test_numbers_of_the_models_own_cost_score(self, agent_of: Any) -> None:
        quote = "The lease is 6 seconds."
        assert self.judged(agent_of, "Guests: the lease is 60 seconds.", quote)["grounded"] is False
        assert self.judged(agent_of, "Guests: the lease is 6 seconds.", quote)["grounded"] is True

    def test_the_planner_finds_the_passage_and_its_line(self, agent_of: Any) -> None:
        text = "# Leases\n\nNothing here.\n\nA guest without its lease\nstands still.\n\n```\nlease guest\n```\n"
        documents = [{"path": "a.md", "text": text}, {"path": "b.md", "text": "Bees dance.\n"}]
        asked = {"question": "What does a guest do without a lease?", "documents": documents, "readings": 2}
        planned = agent_of("research/planner").run(asked)
        (reading,) = planned["readings"]
        assert (reading["path"], reading["line"]) == ("a.md", 5) and reading["text"].startswith("A guest without")
        assert set(planned["terms"]) == {"guest", "leas"}

    def test_the_planner_says_that_no_document_fits(self, agent_of: Any) -> None:
        asked = {"question": "Who is Ada?", "documents": [{"path": "b.md", "text": "Bees dance."}], "readings": 2}
        with pytest.raises(ValueError, match=r"none of 1 documents has a word of the question \(ada\)"):
            agent_of("research/planner").run(asked)

    def test_the_nearest_sentence_is_quoted_word_for_word(self, agent_of: Any) -> None:
        explorer = agent_of("research/explorer")
        cut = explorer.sentences(self.PASSAGE)
        assert len(cut) == 3
        assert explorer.nearest("guests stand still, no lease", cut) == "Without a lease guests stand still."
        assert explorer.nearest("xyz", cut) == ""
        only = {"question": "?", "path": "a.md", "line": 1, "relevance": 1.0, "text": cut[0]}
        assert explorer.run(only)["quote"] == cut[0], "without a model, where there is nothing to choose"

    @pytest.mark.parametrize(
        ("output", "text"),
        [({"answer": "Blue."}, "Blue."), ({"n": 7}, '{"n": 7}'), ({"b": "ä", "a": 1}, '{"a": 1, "b": "ä"}')],
    )
    def test_what_is_turned_into_a_vector(self, agent_of: Any, output: dict[str, Any], text: str) -> None:
        asked: list[str] = []
        meaning = agent_of("same-meaning/meaning")
        embed = lambda given: asked.append(given) or types.SimpleNamespace(vectors=[[1.0, 0.5]])  # noqa: E731
        meaning.model = types.SimpleNamespace(embed=embed)
        assert meaning.run({"input": {}, "output": output}) == {"vector": [1.0, 0.5]}
        assert asked == [text]

    @pytest.mark.parametrize(
        ("calculation", "answer"), [("7 * 5", 35), ("7x5", 35), ("7 / 5", 1.4), ("(7 + 5) * 5", 60)]
    )
    def test_the_solver_calculates(self, agent_of: Any, calculation: str, answer: float) -> None:
        assert agent_of("self-consistency/solver").solved(calculation, "7 eggs in 5 boxes") == answer

    @pytest.mark.parametrize(
        "calculation", ["", "7 * 6", "7 eggs", "7 ** 5 ** 5", "7 / (5 - 5)", "__import__('os')", "1e5", "7 *", "-5"]
    )
    def test_what_is_no_calculation_is_no_vote(self, agent_of: Any, calculation: str) -> None:
        with pytest.raises(ValueError, match=r"calculation|numbers"):
            agent_of("self-consistency/solver").solved(calculation, "7 eggs in 5 boxes")

    def test_the_proofreader_sees_a_finding_that_no_critic_kept(self, agent_of: Any) -> None:
        found = {"path": "a.py", "line": 1, "function": "f", "rule": "long-function", "value": 50}
        false = {**found, "function": "g"}
        reviews = [{"kept": [found], "dropped": [false], "files": 1}]
        proofreader, integrator = agent_of("code-review/proofreader"), agent_of("code-review/integrator")
        report = integrator.run({"reviews": reviews})
        assert proofreader.run({"input": {"reviews": reviews}, "output": report})["score"] == 1
        forged = {**report, "ranked": [{**false, "severity": 99}, *report["ranked"]]}
        checks = proofreader.run({"input": {"reviews": reviews}, "output": forged})["checks"]
        assert not checks["every finding was kept by a critic"] and not checks["nothing that was dropped is in it"]
