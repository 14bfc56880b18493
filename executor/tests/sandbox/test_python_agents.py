import json
from importlib import resources
from typing import Any

import pytest
from hive_common.artifacts.runtimes import PYTHON_RUNTIME
from hive_executor.sandbox import Outcome, Program, RunnerPool

from .conftest import MIB, limits, python


async def output_of(
    pool: RunnerPool, source: str, input_: Any = None, siblings: dict[str, str | bytes] | None = None
) -> Any:
    outcome = await pool.run(python(source, siblings), json.dumps(input_ or {}).encode(), limits())
    assert outcome.status == "succeeded", outcome
    assert outcome.output is not None
    return json.loads(outcome.output)


async def failure_of(pool: RunnerPool, source: str, siblings: dict[str, str | bytes] | None = None) -> Outcome:
    outcome = await pool.run(python(source, siblings), b"{}", limits())
    assert outcome.status == "failed"
    assert outcome.output is None
    return outcome


async def test_returns_what_run_returned(pool: RunnerPool) -> None:
    outcome = await pool.run(
        python("def run(input):\n    return {'square': input['n'] ** 2}"), b'{"n": 7}', limits()
    )

    assert (outcome.status, outcome.code, outcome.output) == ("succeeded", None, b'{"square":49}')
    assert outcome.fuel_used > 0
    assert outcome.log == []


async def test_the_component_is_the_runtime_that_agents_name_as_their_layer(pool: RunnerPool) -> None:
    said = json.loads(PYTHON_RUNTIME)
    source = "import sys\ndef run(input):\n    return {'python': '.'.join(map(str, sys.version_info[:2]))}"
    assert await output_of(pool, source) == {"python": said["python"]}
    world = resources.files("hive_executor.guest").joinpath("agent.wit").read_text()
    assert f"package {said['world']};" in world


async def test_integers_of_any_size_survive(pool: RunnerPool) -> None:
    assert await output_of(pool, "def run(input):\n    return input", {"n": 2**200}) == {"n": 2**200}


async def test_siblings_packages_and_data_files_are_importable(pool: RunnerPool) -> None:
    source = """
import helper
from lib.deep import value
import pkgutil
def run(input):
    return {"helper": helper.NAME, "deep": value.V, "data": pkgutil.get_data("lib", "x.bin").hex()}
"""
    siblings = {
        "helper.py": "NAME = __name__",
        "lib/__init__.py": "",
        "lib/x.bin": b"\xff\x00",
        "lib/deep/value.py": "from .. import __name__ as parent\nV = parent",
    }
    assert await output_of(pool, source, siblings=siblings) == {"helper": "helper", "deep": "lib", "data": "ff00"}


async def test_a_sibling_wins_over_the_standard_module_of_its_name(pool: RunnerPool) -> None:
    source = "import queue\ndef run(input):\n    return {'mine': queue.MINE}"
    assert await output_of(pool, source, siblings={"queue.py": "MINE = True"}) == {"mine": True}


async def test_each_attempt_starts_fresh(pool: RunnerPool) -> None:
    source = (
        "import json\ndef run(input):\n    seen = hasattr(json, 'mark'); json.mark = 1\n    return {'seen': seen}"
    )
    for _ in range(3):
        assert await output_of(pool, source) == {"seen": False}


async def test_random_differs_between_attempts(pool: RunnerPool) -> None:
    source = (
        "import random, uuid, secrets\ndef run(input):\n"
        "    return {'r': [random.random(), str(uuid.uuid4()), secrets.token_hex()]}"
    )
    first, second = await output_of(pool, source), await output_of(pool, source)
    assert all(a != b for a, b in zip(first["r"], second["r"], strict=True))


async def test_async_agents_can_sleep_and_gather(pool: RunnerPool) -> None:
    source = """
import asyncio
async def one(n):
    await asyncio.sleep(0.01)
    return n
async def run(input):
    return {"all": await asyncio.gather(*map(one, range(5)))}
"""
    assert await output_of(pool, source) == {"all": [0, 1, 2, 3, 4]}


async def test_traceback_shows_the_agents_frames_and_lines_and_no_others(pool: RunnerPool) -> None:
    source = "import helper\n\ndef run(input):\n    return helper.divide(1)\n"
    outcome = await failure_of(pool, source, {"helper.py": "def divide(n):\n    return n / 0  # oops\n"})

    assert outcome.code == "agent_error"
    assert outcome.message == "ZeroDivisionError: division by zero"
    assert 'File "agent.py", line 4, in run' in outcome.detail
    assert 'File "helper.py", line 2, in divide' in outcome.detail
    assert "return n / 0  # oops" in outcome.detail
    assert "_hive_" not in outcome.detail
    assert "importlib" not in outcome.detail


async def test_syntax_error_shows_the_line(pool: RunnerPool) -> None:
    outcome = await failure_of(pool, "def run(input)\n    return {}\n")
    assert outcome.code == "agent_error"
    assert outcome.message.startswith("SyntaxError")
    assert "def run(input)" in outcome.detail


async def test_missing_run_says_what_was_expected(pool: RunnerPool) -> None:
    outcome = await failure_of(pool, "def main(input):\n    return {}\n")
    assert outcome.code == "agent_error"
    assert "def run(input: dict) -> dict" in outcome.message


@pytest.mark.parametrize(
    "raising",
    ["raise SystemExit(0)", "raise KeyboardInterrupt", "import os; os._exit(3)", "import os; os.abort()"],
)
async def test_leaving_in_other_ways_is_a_failure(pool: RunnerPool, raising: str) -> None:
    outcome = await failure_of(pool, f"def run(input):\n    {raising}")
    assert outcome.code in {"agent_error", "trap"}
    assert await output_of(pool, "def run(input):\n    return {}") == {}


async def test_deep_recursion_is_the_agents_error(pool: RunnerPool) -> None:
    outcome = await failure_of(pool, "def f(n):\n    return f(n + 1)\ndef run(input):\n    return {'n': f(0)}")
    assert outcome.code == "agent_error"
    assert outcome.message.startswith("RecursionError")


async def test_recursion_in_c_ends_the_guest_and_nothing_else(pool: RunnerPool) -> None:
    source = "import sys\nsys.setrecursionlimit(10**9)\ndef f(n):\n    return sorted([1], key=lambda _: f(n + 1))\n"
    outcome = await failure_of(pool, source + "def run(input):\n    return {'n': f(0)}")
    assert outcome.code in {"trap", "agent_error", "memory_exceeded"}
    assert pool.stats()["restarts"] == 0


@pytest.mark.parametrize(
    ("returned", "named"),
    [
        ("[1]", "list"),
        ("None", "NoneType"),
        ("{'x': {1, 2}}", "set"),
        ("{'x': float('nan')}", "nan"),
        ("{'x': '\\ud800'}", "not JSON"),
    ],
)
async def test_what_is_no_json_object_is_invalid_output(pool: RunnerPool, returned: str, named: str) -> None:
    outcome = await failure_of(pool, f"def run(input):\n    return {returned}")
    assert outcome.code == "invalid_output"
    assert named in outcome.message


@pytest.mark.parametrize("depth", [3_000, 100_000])
async def test_nesting_that_no_reader_could_follow_is_refused(pool: RunnerPool, depth: int) -> None:
    source = f"def run(input):\n    x = {{}}\n    for _ in range({depth}):\n        x = {{'x': x}}\n    return x"
    outcome = await failure_of(pool, source)
    # CPython's JSON writer recurses in C, so the deeper one meets the end of the engine's stack first.
    assert outcome.code in {"invalid_output", "trap"}
    assert pool.stats()["restarts"] == 0


async def test_print_stderr_logging_and_log_go_to_the_log(pool: RunnerPool) -> None:
    source = """
import logging, sys
from hive import log
def run(input):
    print("printed", 1)
    print("to stderr", file=sys.stderr)
    log.info("half %d%%", 50)
    log.error("bad")
    log("quiet", level="debug")
    print("two\\nlines")
    print("no newline", end="")
    return {}
"""
    outcome = await pool.run(python(source), b"{}", limits())

    assert [(line.level, line.text) for line in outcome.log] == [
        ("info", "printed 1"),
        ("warning", "to stderr"),
        ("info", "half 50%"),
        ("error", "bad"),
        ("debug", "quiet"),
        ("info", "two"),
        ("info", "lines"),
        ("info", "no newline"),
    ]
    assert not outcome.log_truncated
    assert all(line.ts_us > 1_700_000_000_000_000 for line in outcome.log)


async def test_log_is_bounded_and_says_so(pool: RunnerPool) -> None:
    source = "def run(input):\n    for n in range(20000):\n        print('x' * 100)\n    return {}"
    outcome = await pool.run(python(source), b"{}", limits(log_bytes=100_000))

    assert outcome.status == "succeeded"
    assert outcome.log_truncated
    assert 0 < sum(len(line.text) for line in outcome.log) <= 100_000


@pytest.mark.usefixtures("patient")
async def test_endless_loop_ends_with_timeout(pool: RunnerPool) -> None:
    outcome = await pool.run(python("def run(input):\n    while True: pass"), b"{}", limits(wall_ms=200))
    assert outcome.code == "timeout"
    assert "200 ms" in outcome.message
    assert pool.stats()["restarts"] == 0


@pytest.mark.usefixtures("patient")
@pytest.mark.parametrize("sleep", ["time.sleep(3600)", "asyncio.run(asyncio.sleep(3600))"])
async def test_sleep_past_the_limit_ends_and_its_log_is_kept(pool: RunnerPool, sleep: str) -> None:
    source = f"import asyncio, time\ndef run(input):\n    print('before')\n    {sleep}"
    outcome = await pool.run(python(source), b"{}", limits(wall_ms=1_500))

    assert outcome.code == "timeout"
    assert [line.text for line in outcome.log] == ["before"]
    assert await output_of(pool, "def run(input):\n    return {}") == {}
    assert pool.stats()["restarts"] == 0


async def test_sleep_is_as_the_interpreter_has_it(pool: RunnerPool) -> None:
    source = (
        "import sched, time\n"
        "class Own:\n"
        "    sleep = time.sleep\n"
        "def what(seconds):\n"
        "    began = time.monotonic()\n"
        "    try:\n"
        "        Own().sleep(seconds)\n"
        "    except Exception as error:\n"
        "        return type(error).__name__\n"
        "    return time.monotonic() - began >= seconds\n"
        "def run(input):\n"
        "    sleeps = [0, 0.001, 0.12, 1, True, -1, float('nan'), float('inf'), '1', None]\n"
        "    scheduler = sched.scheduler()\n"
        "    scheduler.enter(0.05, 1, lambda: None)\n"
        "    scheduler.run()\n"
        "    return {'all': [what(seconds) for seconds in sleeps], 'name': time.sleep.__name__}\n"
    )
    found = await output_of(pool, source)
    refused = ["ValueError", "ValueError", "OverflowError", "TypeError", "TypeError"]
    assert found == {"all": [True] * 5 + refused, "name": "sleep"}


async def test_fuel_runs_out(pool: RunnerPool) -> None:
    outcome = await pool.run(python("def run(input):\n    while True: pass"), b"{}", limits(fuel=50_000_000))
    assert outcome.code == "fuel_exhausted"
    assert outcome.fuel_used == 50_000_000


async def test_memory_growth_ends_with_memory_exceeded(pool: RunnerPool) -> None:
    source = "def run(input):\n    kept = []\n    while True:\n        kept.append(bytearray(1 << 20))"
    outcome = await pool.run(python(source), b"{}", limits(memory_bytes=32 * MIB))

    assert outcome.code == "memory_exceeded"
    assert outcome.memory_peak_bytes is None or 24 * MIB < outcome.memory_peak_bytes <= 40 * MIB


async def test_small_objects_without_end_are_stopped_by_the_same_limit(pool: RunnerPool) -> None:
    source = "def run(input):\n    x = []\n    while True:\n        x.append([x])"
    outcome = await pool.run(python(source), b"{}", limits(memory_bytes=16 * MIB))
    assert outcome.code in {"memory_exceeded", "trap"}


async def test_output_over_its_limit(pool: RunnerPool) -> None:
    outcome = await pool.run(
        python("def run(input):\n    return {'x': 'y' * 5000}"), b"{}", limits(output_bytes=1000)
    )
    assert outcome.code == "output_exceeded"


async def test_the_guest_sees_nothing_of_the_host(pool: RunnerPool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HIVE_SECRET", "do-not-leak")
    source = """
import os, sys, socket
def attempt(function, *arguments):
    try:
        return repr(function(*arguments))
    except Exception as error:
        return type(error).__name__
def run(input):
    return {
        "env": [k for k in os.environ if "HIVE" in k or "PATH" in k or "HOME" in k],
        "argv": [a for a in sys.argv if a],
        "files": attempt(os.listdir, "/"),
        "passwd": attempt(open, "/etc/passwd"),
        "network": attempt(socket.create_connection, ("127.0.0.1", 22)),
        "lookup": attempt(socket.getaddrinfo, "localhost", 80),
        "process": attempt(lambda: os.system("true")),
    }
"""
    seen = await output_of(pool, source)

    assert seen["env"] == []
    assert seen["argv"] == []
    assert {seen["files"], seen["passwd"]} <= {"FileNotFoundError", "OSError", "PermissionError"}
    assert "socket" not in seen["network"]
    assert "127.0.0.1" not in seen["lookup"]
    assert seen["process"] in {"AttributeError", "OSError", "NotImplementedError"}


@pytest.mark.parametrize(
    ("files", "entry", "named"),
    [
        ({"a.py": b""}, "agent.py", "agent.py"),
        ({"agent.py": b"", "../evil.py": b""}, "agent.py", "../evil.py"),
        ({"agent.py": b"", "/evil.py": b""}, "agent.py", "/evil.py"),
        ({"agent.py": b"", "a//b.py": b""}, "agent.py", "a//b.py"),
        ({"agent.py": b"x" * (9 * MIB)}, "agent.py", "bytes"),
        ({"agent.txt": b""}, "agent.txt", ".py"),
    ],
)
async def test_sources_out_of_bounds_are_invalid(
    pool: RunnerPool, files: dict[str, bytes], entry: str, named: str
) -> None:
    outcome = await pool.run(Program("python", f"test:{named}", entry, files), b"{}", limits())
    assert outcome.code == "invalid_module"
    assert named in outcome.message


async def test_an_agent_is_compiled_once_and_not_in_each_guest(pool: RunnerPool) -> None:
    small = await pool.run(python("def run(input):\n    return {}\n"), b"{}", limits())
    unused = "def unused(x):\n" + "    x = x + 1\n" * 2_000
    large = await pool.run(python(unused + "def run(input):\n    return {}\n"), b"{}", limits())
    assert small.status == large.status == "succeeded"
    # Compiling those lines takes 150 times the fuel of the small agent, reading their code 20 times.
    assert large.fuel_used < 50 * small.fuel_used
