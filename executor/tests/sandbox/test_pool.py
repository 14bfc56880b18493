import asyncio
import json
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
import uvloop
from hive_common.kernel.errors import Unavailable
from hive_executor.sandbox import LogLine, Program, RunnerPool, prepare_python_runtime

from .conftest import limits, python

ECHO = python("def run(input):\n    return input")
LOOP = python("def run(input):\n    print('up')\n    while True: pass")


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


async def test_two_hundred_attempts_over_two_runners(cache_dir: Path) -> None:
    await prepare_python_runtime(cache_dir)
    pool = RunnerPool(size=2, cache_dir=cache_dir)
    await pool.start()
    try:
        outcomes = await asyncio.gather(
            *(pool.run(ECHO, json.dumps({"n": n}).encode(), limits(wall_ms=60_000)) for n in range(200))
        )
        assert [json.loads(outcome.output or b"null") for outcome in outcomes] == [{"n": n} for n in range(200)]
        stats = pool.stats()
        assert (stats["size"], stats["busy"], stats["restarts"], len(stats["pids"])) == (2, 0, 0, 2)
    finally:
        await pool.close()


async def test_killed_runner_is_runner_died_and_the_pool_goes_on(pool: RunnerPool) -> None:
    started = asyncio.Event()
    attempt = asyncio.create_task(pool.run(LOOP, b"{}", limits(), on_log=lambda _: started.set()))
    await asyncio.wait_for(started.wait(), 30)
    (pid,) = pool.stats()["pids"]

    os.kill(pid, signal.SIGKILL)

    assert (await attempt).code == "runner_died"
    assert (await pool.run(ECHO, b'{"n":1}', limits())).output == b'{"n":1}'
    assert pool.stats()["restarts"] == 1
    assert not alive(pid)


async def test_runner_killed_while_idle_is_replaced(pool: RunnerPool) -> None:
    (pid,) = pool.stats()["pids"]
    os.kill(pid, signal.SIGKILL)
    await until(lambda: pool.stats()["pids"] not in ([], [pid]))
    assert (await pool.run(ECHO, b"{}", limits())).status == "succeeded"


async def test_cancelled_while_waiting_for_a_runner(pool: RunnerPool) -> None:
    first = asyncio.create_task(pool.run(LOOP, b"{}", limits(wall_ms=500)))
    await asyncio.sleep(0.05)
    second = asyncio.create_task(pool.run(ECHO, b"{}", limits()))
    await asyncio.sleep(0.05)
    second.cancel()
    with pytest.raises(asyncio.CancelledError):
        await second
    assert (await first).code == "timeout"
    assert (await pool.run(ECHO, b"{}", limits())).status == "succeeded"


async def test_close_leaves_no_process_and_ends_what_runs(cache_dir: Path) -> None:
    await prepare_python_runtime(cache_dir)
    pool = RunnerPool(size=2, cache_dir=cache_dir)
    await pool.start()
    started = asyncio.Event()
    attempt = asyncio.create_task(pool.run(LOOP, b"{}", limits(), on_log=lambda _: started.set()))
    await asyncio.wait_for(started.wait(), 30)
    pids = pool.stats()["pids"]

    await pool.close()

    assert len(pids) == 2
    assert not any(map(alive, pids))
    assert (await attempt).code == "runner_died"
    with pytest.raises(Unavailable):
        await pool.run(ECHO, b"{}", limits())


async def test_runners_end_with_their_parent(cache_dir: Path) -> None:
    script = (
        "import asyncio, sys\nfrom pathlib import Path\nfrom hive_executor.sandbox import RunnerPool\n"
        "async def main():\n"
        "    pool = RunnerPool(size=1, cache_dir=Path(sys.argv[1]))\n    await pool.start()\n"
        "    print(pool.stats()['pids'][0], flush=True)\n    await asyncio.sleep(60)\nasyncio.run(main())"
    )
    parent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", script, str(cache_dir), stdout=asyncio.subprocess.PIPE
    )
    assert parent.stdout is not None
    pid = int(await asyncio.wait_for(parent.stdout.readline(), 30))
    assert alive(pid)
    parent.kill()
    await parent.wait()
    await until(lambda: not alive(pid))


async def test_log_lines_come_while_the_guest_runs(pool: RunnerPool) -> None:
    seen: list[LogLine] = []
    attempt = asyncio.create_task(pool.run(LOOP, b"{}", limits(), on_log=seen.append))
    await until(lambda: bool(seen))
    assert not attempt.done()
    assert seen[0].text == "up"
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt


async def test_a_program_the_runner_forgot_is_sent_again(pool: RunnerPool) -> None:
    # Three bundles of 12 MB each do not fit into what a runner keeps.
    programs = [
        python("def run(input):\n    return {}", {f"{n}.txt": b"\xff" * 7_000_000}) for n in ("a", "b", "c", "d")
    ]
    for program in [*programs, *programs]:
        outcome = await pool.run(program, b"{}", limits(memory_bytes=256 << 20))
        assert outcome.status == "succeeded", outcome.message


def test_works_under_uvloop(cache_dir: Path) -> None:
    async def work() -> None:
        await prepare_python_runtime(cache_dir)
        pool = RunnerPool(size=1, cache_dir=cache_dir)
        await pool.start()
        try:
            assert (await pool.run(ECHO, b"{}", limits())).status == "succeeded"
            assert (await pool.run(LOOP, b"{}", limits(wall_ms=100))).code == "timeout"
        finally:
            await pool.close()

    uvloop.run(work())


async def test_input_over_its_bound_is_refused(pool: RunnerPool) -> None:
    outcome = await pool.run(ECHO, b" " * ((64 << 20) + 1), limits())
    assert outcome.code == "agent_error"
    assert isinstance(ECHO, Program)
