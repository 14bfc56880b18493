"""The folder that a guest may have: of its size, empty at first, gone at the end, and a way to nowhere else."""

import asyncio
import json
from collections.abc import Callable

import pytest
from hive_common.kernel.errors import FailedPrecondition
from hive_executor.sandbox import Program, RunnerPool
from hive_executor.sandbox.confine import EMPTY_ROOT

from .conftest import MIB, limits, python

Module = Callable[[str], Program]

WRITE = python(
    "import os, json\n"
    "def run(input):\n"
    "    before = os.listdir('/scratch')\n"
    "    os.mkdir('/scratch/sub')\n"
    "    with open('/scratch/sub/a.txt', 'w') as file:\n"
    "        file.write('grüezi ' * 1000)\n"
    "    os.rename('/scratch/sub/a.txt', '/scratch/b.txt')\n"
    "    with open('/scratch/b.txt', 'r+') as file:\n"
    "        file.seek(0)\n"
    "        file.write('G')\n"
    "    text = open('/scratch/b.txt').read()\n"
    "    size = os.stat('/scratch/b.txt').st_size\n"
    "    os.rmdir('/scratch/sub')\n"
    "    return {'before': before, 'after': os.listdir('/scratch'), 'text': text[:7], 'size': size}\n"
)


@pytest.fixture
async def scratchy(pool: RunnerPool) -> RunnerPool:
    if EMPTY_ROOT not in pool.stats()["layers"]:
        pytest.skip("needs user namespaces with mounts: run on Linux with unprivileged user namespaces")
    return pool


async def test_an_agent_has_files_and_the_next_one_finds_none_of_them(scratchy: RunnerPool) -> None:
    for _ in range(2):
        outcome = await scratchy.run(WRITE, b"{}", limits(), scratch_bytes=MIB)
        assert json.loads(outcome.output or b"{}") == {
            "before": [],
            "after": ["b.txt"],
            "text": "Grüezi ",
            "size": 8000,
        }, outcome
    # The runners that had it are gone, and the others know nothing of it.
    assert len(scratchy.stats()["pids"]) == 1
    outcome = await scratchy.run(WRITE, b"{}", limits())
    assert outcome.code == "agent_error"
    assert "/scratch" in outcome.message


async def test_more_than_its_size_does_not_fit(scratchy: RunnerPool) -> None:
    program = python(
        "import os\n"
        "def run(input):\n"
        "    written, errors = 0, []\n"
        "    for name in 'ab':\n"
        "        try:\n"
        "            with open('/scratch/' + name, 'wb', buffering=0) as file:\n"
        "                while True:\n"
        "                    written += file.write(bytes(4096))\n"
        "        except OSError as error:\n"
        "            errors.append(type(error).__name__)\n"
        "    os.remove('/scratch/a')\n"
        "    with open('/scratch/c', 'wb') as file:\n"
        "        file.write(bytes(4096))\n"
        "    return {'written': written, 'errors': errors}\n"
    )
    outcome = await scratchy.run(program, b"{}", limits(), scratch_bytes=MIB + 100)
    assert json.loads(outcome.output or b"{}") == {"written": MIB, "errors": ["OSError", "OSError"]}, outcome


async def test_so_many_files_and_no_more(scratchy: RunnerPool) -> None:
    program = python(
        "def run(input):\n"
        "    made = 0\n"
        "    try:\n"
        "        for number in range(10_000):\n"
        "            open(f'/scratch/{number}', 'w').close()\n"
        "            made += 1\n"
        "    except OSError as error:\n"
        "        return {'made': made, 'errno': error.errno}\n"
        "    return {'made': made}\n"
    )
    outcome = await scratchy.run(program, b"{}", limits(), scratch_bytes=64 * MIB)
    assert json.loads(outcome.output or b"{}") == {"made": 4095, "errno": 51}, outcome


REACHES_OUT = python(
    "import os\n"
    "def symlinked():\n"
    "    os.symlink('/', '/scratch/root')\n"
    "    return os.listdir('/scratch/root')\n"
    "def upwards():\n"
    "    os.symlink('../..', '/scratch/up')\n"
    "    return os.listdir('/scratch/up')\n"
    "ATTEMPTS = {\n"
    "    'absolute': lambda: open('/etc/passwd').read(),\n"
    "    'upwards': lambda: open('/scratch/../etc/passwd').read(),\n"
    "    'list root': lambda: os.listdir('/scratch/..'),\n"
    "    'write root': lambda: open('/scratch/../x', 'w'),\n"
    "    'symlink': symlinked,\n"
    "    'symlink upwards': upwards,\n"
    "    'hard link': lambda: os.link('/etc/passwd', '/scratch/passwd'),\n"
    "    'proc': lambda: open('/scratch/../proc/self/mem').read(),\n"
    "    'elsewhere': lambda: open('/tmp/x', 'w'),\n"
    "}\n"
    "def run(input):\n"
    "    found = {}\n"
    "    for name, reach in ATTEMPTS.items():\n"
    "        try:\n"
    "            found[name] = f'WORKED: {reach()!r}'[:200]\n"
    "        except Exception as error:\n"
    "            found[name] = type(error).__name__\n"
    "    return found\n"
)


async def test_it_leads_nowhere_else(scratchy: RunnerPool) -> None:
    outcome = await scratchy.run(REACHES_OUT, b"{}", limits(), scratch_bytes=MIB)
    found = json.loads(outcome.output or b"{}")
    assert len(found) == 9, outcome
    assert {name: what for name, what in found.items() if "Error" not in what or "WORKED" in what} == {}


async def test_a_wasi_program_has_it_too(scratchy: RunnerPool, module: Module) -> None:
    outcome = await scratchy.run(module("scratch"), b"{}", limits(), scratch_bytes=MIB)
    assert (outcome.status, outcome.output) == ("succeeded", b'"kept"'), outcome
    assert (await scratchy.run(module("scratch"), b"{}", limits())).code == "agent_error"


async def test_an_attempt_that_is_cancelled_or_too_slow_leaves_no_runner(scratchy: RunnerPool) -> None:
    spin = python("def run(input):\n    open('/scratch/a', 'w').write('x')\n    while True: pass\n")
    assert (await scratchy.run(spin, b"{}", limits(wall_ms=300), scratch_bytes=MIB)).code == "timeout"
    attempt = asyncio.create_task(scratchy.run(spin, b"{}", limits(), scratch_bytes=MIB))
    while scratchy.stats()["busy"] == 0:
        await asyncio.sleep(0.01)
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    assert len(scratchy.stats()["pids"]) == 1
    assert scratchy.stats()["restarts"] == 0


async def test_where_its_size_cannot_be_limited_there_is_none(
    pool: RunnerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for runner in pool._runners:
        monkeypatch.setattr(runner, "layers", ())
    with pytest.raises(FailedPrecondition, match=r"`scratch`.*empty root.*hive doctor"):
        await pool.run(WRITE, b"{}", limits(), scratch_bytes=MIB)
