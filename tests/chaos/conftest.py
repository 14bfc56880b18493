import contextlib
import os
import random
import shutil
import tempfile
from pathlib import Path

import pytest
from hive_common.testing.installation import Installation
from hive_common.testing.scripted import Script, ScriptedModel, ScriptedProcess

from tests.chaos.answers import MODEL, TOKENS, Rig

HERE = Path(__file__).parent
ROUNDS = int(os.environ.get("HIVE_CHAOS_ROUNDS", "1"))
SEED = int(os.environ.get("HIVE_CHAOS_SEED", "20261125"))


@contextlib.contextmanager
def _running():
    home = Path(tempfile.mkdtemp(prefix="hive-chaos-"))
    made = Installation(home)
    try:
        made.up(executors=2)
        made.hive("agent", "push", str(HERE / "agents" / "spin"))
        yield made
    finally:
        made.hive("down", check=False)
        shutil.rmtree(home, ignore_errors=True)


@pytest.fixture(scope="session")
def _installation():
    with _running() as made:
        yield made


@pytest.fixture(scope="module")
def tampered():
    """An installation of its own: an auditor that once saw a break says so until somebody looks."""
    with _running() as made:
        made.hive("run", str(HERE / "job.yaml"), "--input", "numbers=[1,2,3]", "--input", "ms=1")
        yield made


@pytest.fixture(scope="module")
def own_home():
    """An installation of one module, whose configuration may be changed."""
    with _running() as made:
        yield made


@pytest.fixture
def installation(_installation):
    """A running installation that the fault test before has left healed."""
    if not _installation.supervised():
        _installation.up(executors=2)
    _installation.wait_ready()
    return _installation


@pytest.fixture(params=range(ROUNDS), ids=lambda number: f"seed{SEED + number}")
def rng(request):
    return random.Random(SEED + request.param)


@pytest.fixture(scope="session")
def served():
    """An installation with a model; others that are shared have none."""
    folder = Path(tempfile.mkdtemp(prefix="hive-answers-"))
    installation = Installation(folder / "home")
    try:
        with ScriptedProcess(folder, Script(models=(ScriptedModel(name=MODEL),), tokens=TOKENS)) as back_end:
            installation.hive("init", "--free-ports", "--executors", "2")
            installation.hive("up", "--detach", "--model-url", back_end.url)
            yield installation, back_end
    finally:
        installation.hive("down", check=False)
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
async def rig(served):
    """Where answers are lost."""
    made = Rig(*served)
    await made.prepare()
    return made
