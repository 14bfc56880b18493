"""The documents as a new user types them: README's tour as one script, and the commands of the examples."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hive_cli.supervisor.public import local_addresses
from hive_common.ops.ports import free_port
from hive_common.testing.installation import Installation

ROOT = Path(__file__).resolve().parents[2]
VENV = Path(sys.prefix)
SET_UP_ALREADY = "make setup"
SECONDS_MAX = 180.0


def blocks_of(title: str, language: str = "bash") -> list[str]:
    """Return the shell blocks, or others, of a section of the README."""
    text = (ROOT / "README.md").read_text()
    section = re.search(rf"^## {title}$(.*?)^## ", text, re.MULTILINE | re.DOTALL)
    assert section, f"README.md has no section `{title}`"
    return re.findall(rf"^```{language}\n(.*?)^```$", section[1], re.MULTILINE | re.DOTALL)


def tour() -> str:
    """Return the shell blocks of the tour, without the set-up that has been done before any test runs."""
    lines = "".join(blocks_of("Five minutes")).splitlines()
    assert lines.count(SET_UP_ALREADY) == 1
    return "\n".join(line for line in lines if line != SET_UP_ALREADY)


def typed(script: str, folder: Path, environment: dict[str, str]) -> "subprocess.CompletedProcess[str]":
    """Run lines as somebody types them, but stop at the first that fails; each is echoed before it runs."""
    command = ["bash", "--noprofile", "--norc", "-euxo", "pipefail", "-c", script]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS_MAX, check=False
    )
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@pytest.fixture
def scratch() -> Iterator[Installation]:
    """A home where nothing has been started yet, and where nothing is left running."""
    # A short path: those of sockets are limited to some hundred bytes.
    home = Path(tempfile.mkdtemp(prefix="hive-tour-"))
    installation = Installation(home / "home")
    try:
        yield installation
    finally:
        installation.hive("down", check=False)
        shutil.rmtree(home, ignore_errors=True)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the tour shows REST with curl, which is not here")
def test_the_tour_works_as_it_is_typed(scratch: Installation, tmp_path: Path) -> None:
    # What the tour writes goes beside links to what it reads, not into the repository.
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (tmp_path / ".venv").symlink_to(VENV)
    environment = {
        "HOME": str(tmp_path),
        "PATH": "/usr/local/bin:/usr/bin:/bin",
        "HIVE_HOME": str(scratch.home),
        "XDG_CACHE_HOME": os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache"),
    }
    done = typed(tour(), tmp_path, environment)
    out = done.stdout
    assert out.count('"greeting": "Hello, Ada!"') == 2, "tried in the sandbox, then run as a job"
    assert '"total": 30' in out
    assert out.count("log verified") == 2, "in the database, then in the export"
    assert "1 LogCreated" in out, "the extension reads from the first event on"
    assert '{"jobs":[{"job_id":' in out, "REST takes the key"
    assert out.count("data: [DONE]") == 1
    assert scratch.hive("status", check=False).returncode == 3, "the tour ends with `hive down`"


@pytest.mark.skipif(not local_addresses(), reason="give this machine an address that is not of the loopback")
def test_a_second_machine_is_added_as_it_is_typed(scratch: Installation, tmp_path: Path) -> None:
    """Both homes are on this machine, and meet over TLS at its own address."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**scratch.environment, "PATH": f"{VENV / 'bin'}:/usr/local/bin:/usr/bin:/bin"}
    on_second = {**environment, "HIVE_HOME": str(scratch.home.parent / "second")}
    scratch.hive("init", "--free-ports")
    first, second, afterwards = blocks_of("Add a second machine")
    try:
        token = typed(first, tmp_path, environment).stdout.split()[-1]
        said = typed(second, tmp_path, {**on_second, "TOKEN": token}).stdout
        assert "laptop works for https://" in said
        scratch.hive("agent", "push", *(str(ROOT / "examples" / "squares" / name) for name in ("square", "total")))
        said = typed(afterwards, tmp_path, environment).stdout
        assert "laptop" in said and '"total": 204' in said
    finally:
        Installation(Path(on_second["HIVE_HOME"])).hive("down", check=False)


@pytest.mark.skipif(shutil.which("curl") is None, reason="the section shows REST with curl, which is not here")
def test_models_are_used_as_it_is_typed(scratch: Installation, tmp_path: Path) -> None:
    """Editors are no part of it: they need the same address and key."""
    pytest.importorskip("xllamacpp", reason="needs the extra `model`: make setup installs it")
    title = "Use it from your editor"
    (program,) = blocks_of(title, "python")
    (tmp_path / "program.py").write_text(program)
    environment = {**scratch.environment, "PATH": f"{VENV / 'bin'}:/usr/local/bin:/usr/bin:/bin"}
    scratch.hive("init", "--free-ports")
    script = "".join(blocks_of(title)) + "\necho answers:\npython program.py\n"
    said, _, answers = typed(script, tmp_path, environment).stdout.partition("answers:\n")
    assert "smollm2" in said and said.count("data: [DONE]") == 1
    assert len([line for line in answers.splitlines() if line.strip()]) >= 2, "a line of each client"
    assert '"summary"' in typed(commands_of("summarise"), ROOT / "examples" / "summarise", environment).stdout


def listens(address: str, process: "subprocess.Popen[bytes]") -> None:
    """Return when somebody listens there."""
    host, _, port = address.rpartition(":")
    while True:
        assert process.poll() is None, "the registry has ended"
        with contextlib.suppress(OSError), socket.create_connection((host, int(port))):
            return
        time.sleep(0.05)


@pytest.mark.timeout(3 * SECONDS_MAX)
def test_an_agent_is_signed_and_shared_as_it_is_typed(scratch: Installation, tmp_path: Path) -> None:
    binary = shutil.which("docker-registry")
    if binary is None:
        pytest.skip("docker-registry is not here; fix: apt-get install --no-install-recommends docker-registry")
    address = f"127.0.0.1:{free_port()}"
    config = tmp_path / "registry.yml"
    config.write_text(
        f"version: 0.1\nstorage: {{filesystem: {{rootdirectory: {tmp_path}/oci}}}}\nhttp: {{addr: '{address}'}}\n"
    )
    environment = {
        **scratch.environment,
        "PATH": f"{VENV / 'bin'}:/usr/local/bin:/usr/bin:/bin",
        "REGISTRY": address,
    }
    scratch.hive("init", "--free-ports")
    signed, shared, stopped = blocks_of("Write, sign and share an agent")
    with subprocess.Popen(
        [binary, "serve", str(config)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as oci:
        try:
            said = typed(signed, tmp_path, environment).stdout
            assert "not yet: nobody trusts this key here" in said and '"greeting": "Hello, Bob!"' in said
            listens(address, oci)
            said = typed(shared, tmp_path, environment).stdout
            assert f"{address}/agents/greeting:1.0.0" in said and "ada" in said
            said = typed(stopped, tmp_path, environment).stdout
            assert "greeting@1.0.0 is yanked: greets the wrong people" in said and "the laptop is gone" in said
        finally:
            oci.terminate()


def commands_of(example: str) -> str:
    """Return the commands of an example's README, a line each; that of one `run.py` is tried elsewhere."""
    text = (ROOT / "examples" / example / "README.md").read_text()
    commands = re.findall(r"^    ((?:hive |JOB=|python (?!\S+/run\.py)).*)$", text, re.MULTILINE)
    assert commands
    return "\n".join(commands)


@pytest.mark.parametrize(
    ("example", "folder"),
    [
        ("squares", "examples/squares"),
        ("code-review", "examples/code-review"),
        ("map-reduce", "examples/map-reduce"),
        ("changes", "examples/changes"),
        ("extension", ""),
    ],
)
def test_the_commands_of_an_example_work_where_its_readme_says(
    example: str, folder: str, hive_home: Installation
) -> None:
    environment = {**hive_home.environment, "PATH": f"{VENV / 'bin'}:/usr/local/bin:/usr/bin:/bin"}
    assert typed(commands_of(example), ROOT / folder, environment).stdout


def test_the_agents_of_an_example_that_needs_a_model_are_pushed_as_it_is_typed(hive_home: Installation) -> None:
    """What these do with a model is tried with the examples that judge."""
    environment = {**hive_home.environment, "PATH": f"{VENV / 'bin'}:/usr/local/bin:/usr/bin:/bin"}
    for example in ("research", "self-consistency", "same-meaning"):
        pushes = [line for line in commands_of(example).splitlines() if line.startswith("hive agent push ")]
        assert pushes, example
        assert "sha256:" in typed("\n".join(pushes), ROOT / "examples" / example, environment).stdout
