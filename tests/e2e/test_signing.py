"""An agent is written, signed, shared and stopped, as its author and an operator would do it."""

import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hive_common.ops.ports import free_port
from hive_common.testing.installation import Installation

AGENT = """\
import time

def run(input: dict) -> dict:
    time.sleep(input.get("sleep_s", 0))
    return {"n": input["n"]}
"""
MANIFEST = """\
apiVersion: hive/v1
kind: Agent
name: {name}
version: {version}
runtime: python
entry: agent.py
resources: {{timeout: 10m}}
"""
JOB = """\
apiVersion: hive/v1
kind: Job
name: signed
tasks:
  - {{id: one, agent: {agent}, input: "${{input}}"}}
output: ${{tasks.one.output}}
"""


@pytest.fixture
def write(tmp_path: Path):
    def make(name: str, version: str = "1.0.0") -> tuple[Path, Path]:
        folder = tmp_path / f"{name}-{version}"
        folder.mkdir()
        (folder / "agent.py").write_text(AGENT)
        (folder / "manifest.yaml").write_text(MANIFEST.format(name=name, version=version))
        (folder / "job.yaml").write_text(JOB.format(agent=f"{name}@{version}"))
        return folder, folder / "job.yaml"

    return make


@pytest.fixture
def oci(tmp_path: Path) -> Iterator[str]:
    binary = shutil.which("docker-registry")
    if binary is None:
        pytest.skip(
            "docker-registry is not installed; fix: apt-get install --no-install-recommends docker-registry"
        )
    address = f"127.0.0.1:{free_port()}"
    config = tmp_path / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path}/oci}}}}\nhttp: {{addr: '{address}'}}\n"
    )
    process = subprocess.Popen([binary, "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    yield address
    process.terminate()
    process.wait()


def until(condition, what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


def test_a_key_is_made_trusted_signed_with_and_distrusted(hive_home: Installation, write) -> None:
    folder, job = write("of-ada")
    made = hive_home.json("agent", "key", "new", "ada")
    assert Path(made["private_file"]).stat().st_mode & 0o777 == 0o600
    again = hive_home.hive("agent", "key", "new", "ada", check=False)
    assert (again.returncode, "exists already" in again.stderr) == (2, True)
    refused = hive_home.hive("agent", "push", str(folder), "--key", "ada", check=False)
    assert refused.returncode != 0
    said = " ".join(refused.stderr.split())
    assert f"{folder}: " in said
    assert said.endswith("which is not trusted here; to trust it: hive agent key trust ada"), (
        "as this home calls it"
    )
    hive_home.hive("agent", "key", "trust", str(Path(made["private_file"]).with_suffix(".pub")))
    (pushed,) = hive_home.json("agent", "push", str(folder), "--key", "ada")["versions"]
    assert pushed["signer"] == made["public_key"]
    assert hive_home.json("run", str(job), "--input", "n=3")["output"] == {"n": 3}

    # What runs ends, and what comes is refused.
    running = hive_home.json("run", str(job), "--input", "n=1", "--input", "sleep_s=600", "--detach")["job_id"]
    until(lambda: hive_home.get(f"/v1/jobs/{running}")["attempts"] == 1, "an attempt was given out")
    hive_home.hive("agent", "key", "distrust", "ada", "--reason", "stolen")
    until(lambda: hive_home.get(f"/v1/jobs/{running}")["state"] == "failed", "what runs ends")
    assert hive_home.get(f"/v1/jobs/{running}")["error"]["code"] == "permission_denied"
    refused = hive_home.hive("run", str(job), "--input", "n=3", check=False)
    assert "which is not trusted: stolen" in " ".join(refused.stderr.split())
    keys = {key["name"]: key for key in hive_home.json("agent", "key", "list")["keys"]}
    assert (keys["author"]["trusted"], keys["author"]["private"]) == (True, True)
    assert (keys["ada"]["trusted"], keys["ada"]["reason"]) == (False, "stolen")


def test_a_yanked_version_takes_no_new_jobs_and_what_runs_goes_on(hive_home: Installation, write) -> None:
    folder, job = write("leaky")
    hive_home.hive("agent", "push", str(folder))
    running = hive_home.json("run", str(job), "--input", "n=1", "--input", "sleep_s=3", "--detach")["job_id"]
    hive_home.hive("agent", "yank", "leaky@1.0.0", "--reason", "it leaks")
    (listed,) = hive_home.json("agent", "list", "leaky")["versions"]
    assert listed["yank_reason"] == "it leaks"
    done = hive_home.hive("run", str(job), "--input", "n=2", check=False)
    assert "was yanked: it leaks" in " ".join(done.stderr.split())
    until(lambda: hive_home.get(f"/v1/jobs/{running}")["state"] == "succeeded", "what runs goes on")


def test_an_agent_goes_through_a_registry_elsewhere(
    hive_home: Installation, write, oci: str, tmp_path: Path
) -> None:
    folder, job = write("shared")
    author = Installation(tmp_path / "author")
    author.hive("agent", "key", "new", "bob")

    def push() -> bool:
        done = author.hive(
            "agent", "push", str(folder), "--key", "bob", "--to", f"{oci}/agents/shared", check=False
        )
        assert done.returncode in (0, 3), done.stderr
        return done.returncode == 0

    until(push, "the registry is up")
    refused = hive_home.hive("agent", "pull", f"{oci}/agents/shared:1.0.0", check=False)
    assert "is not trusted here" in " ".join(refused.stderr.split())
    hive_home.hive("agent", "key", "trust", str(tmp_path / "author" / "keys" / "agents" / "bob.pub"))
    (pulled,) = hive_home.json("agent", "pull", f"{oci}/agents/shared:1.0.0")["versions"]
    assert (pulled["name"], pulled["version"]) == ("shared", "1.0.0")
    assert hive_home.json("run", str(job), "--input", "n=5")["output"] == {"n": 5}
