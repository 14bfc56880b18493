"""Children of the supervisor, as small real processes."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import psutil
import pytest
from hive_cli.supervisor import process
from hive_cli.supervisor.leash import leashed
from hive_cli.supervisor.logs import LOG_BYTES_MAX, bound_log, log_tail
from hive_cli.supervisor.probes import Answer, Probed
from hive_cli.supervisor.process import EXECUTOR_FINALS, Child, ProcessSpec
from hive_executor.bootstrap import REVOKED_EXIT_CODE, SUPERSEDED_EXIT_CODE

SLEEPER = "import time; print('up', flush=True); time.sleep(60)"
DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); time.sleep(60)"
)


async def _ready() -> Probed:
    return Probed(Answer.READY)


@pytest.fixture
async def run(tmp_path: Path) -> AsyncIterator[Callable[..., Child]]:
    children: list[Child] = []

    def make(code: str, probe: Callable[[], Awaitable[Probed]] = _ready, **options: object) -> Child:
        spec = ProcessSpec(
            "child",
            [sys.executable, "-c", code],
            tmp_path / "child.log",
            probe,
            **options,  # type: ignore[arg-type]
        )
        child = Child(spec, lambda: None, lambda text: None)
        children.append(child)
        child.start()
        return child

    yield make
    for child in children:
        await child.stop(patience_s=0.2)


async def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    async with asyncio.timeout(seconds):
        while not holds():
            await asyncio.sleep(0.01)


async def test_a_killed_process_comes_back_with_a_new_pid_and_is_counted(run: Callable[..., Child]) -> None:
    child = run(SLEEPER)
    await child.is_ready.wait()
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    await until(lambda: child.restarts == 1 and child.snapshot().state == "ready")
    assert child.pid not in (None, first)
    assert child.exits == [-signal.SIGKILL]


async def test_a_process_that_dies_at_once_is_tried_again_ever_more_slowly(run: Callable[..., Child]) -> None:
    started = time.monotonic()
    child = run("raise SystemExit(1)")
    await until(lambda: child.restarts >= 4)
    # 0.1 + 0.2 + 0.4 s lie between the first four ends.
    assert time.monotonic() - started >= 0.7


async def test_one_that_was_ready_is_tried_again_at_once_however_often_it_died(
    run: Callable[..., Child], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "HEALTHY_S", 0.0)
    paused: list[float] = []
    pause = Child._pause

    async def noted(child: Child, seconds: float) -> None:
        paused.append(seconds)
        await pause(child, seconds)

    monkeypatch.setattr(Child, "_pause", noted)
    child = run(SLEEPER)
    for count in range(3):
        await until(lambda: child.snapshot().state == "ready")
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await until(lambda: child.restarts > count)  # noqa: B023
    assert set(paused) == {process.BACKOFF_FIRST_S}


async def test_a_process_that_is_held_begins_once_it_is_released_and_later_at_once(
    tmp_path: Path,
) -> None:
    began = tmp_path / "began"
    code = f"import os, pathlib, time; os.read(0, 1); pathlib.Path({str(began)!r}).touch(); time.sleep(60)"

    async def has_begun() -> Probed:
        return Probed(Answer.READY if began.exists() else Answer.SILENT)

    spec = ProcessSpec("child", [sys.executable, "-c", code], tmp_path / "child.log", has_begun)
    child = Child(spec, lambda: None, lambda text: None)
    try:
        child.start(held=True)
        await until(lambda: child.pid is not None)
        held = child.pid
        assert held is not None
        os.kill(held, signal.SIGKILL)  # one that dies before is held again
        await until(lambda: child.pid not in (None, held))
        assert not began.exists()
        child.release()
        await child.is_ready.wait()
        began.unlink()
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        await until(began.exists)
    finally:
        await child.stop(patience_s=0.2)


async def test_a_superseded_executor_is_left_alone(run: Callable[..., Child]) -> None:
    child = run(f"raise SystemExit({SUPERSEDED_EXIT_CODE})", finals=EXECUTOR_FINALS)
    await until(lambda: child.snapshot().state == "superseded")
    assert child.restarts == 0


async def test_a_revoked_executor_is_not_started_for_ever(run: Callable[..., Child]) -> None:
    child = run(f"raise SystemExit({REVOKED_EXIT_CODE})", finals=EXECUTOR_FINALS)
    await until(lambda: child.snapshot().state == "revoked")
    assert child.restarts == 0 and child.pid is None
    assert child.final is not None and "join anew" in child.final.problem


async def test_exit_code_3_of_a_service_means_nothing_special(run: Callable[..., Child]) -> None:
    child = run("raise SystemExit(3)")
    await until(lambda: child.restarts >= 1)


async def test_a_process_that_falls_silent_is_killed_and_started_anew(run: Callable[..., Child]) -> None:
    silent: set[int] = set()
    child: Child

    async def probe() -> Probed:
        if child.pid in silent:
            return Probed(Answer.SILENT, "no answer")
        return Probed(Answer.READY)

    child = run(SLEEPER, probe, silence_s=0.1)
    await child.is_ready.wait()
    assert child.pid is not None
    silent.add(child.pid)
    await until(lambda: child.restarts == 1 and child.snapshot().state == "ready")
    assert child.exits == [-signal.SIGKILL]


async def test_a_process_that_says_it_is_not_ready_is_left_running(run: Callable[..., Child]) -> None:
    answers = iter([Probed(Answer.READY)])

    async def probe() -> Probed:
        return next(answers, Probed(Answer.UNREADY, "the database is away"))

    child = run(SLEEPER, probe, silence_s=0.1)
    await until(lambda: child.snapshot().state == "unready")
    assert child.snapshot().problem == "the database is away"
    assert child.restarts == 0


async def test_a_process_that_was_ready_and_stays_unready_too_long_is_started_anew(
    run: Callable[..., Child],
) -> None:
    stuck: set[int] = set()

    async def probe() -> Probed:
        pid = child.pid
        if pid is None or pid in stuck:
            return Probed(Answer.UNREADY, "stuck")
        stuck.add(pid)
        return Probed(Answer.READY)

    child = run(SLEEPER, probe, unready_s=0.1)
    await until(lambda: child.restarts >= 1)
    assert child.exits[0] == -signal.SIGKILL


async def test_stop_ends_a_process_that_listens_and_kills_one_that_does_not(
    run: Callable[..., Child], tmp_path: Path
) -> None:
    good = run(SLEEPER)
    await good.is_ready.wait()
    await good.stop()
    assert good.exits == [-signal.SIGTERM]
    assert good.snapshot().state == "stopped"
    deaf = run(DEAF)
    await until(lambda: "deaf" in log_tail(tmp_path / "child.log"))
    await deaf.stop(patience_s=0.2)
    assert deaf.exits == [-signal.SIGKILL]


async def test_stop_during_a_pause_does_not_start_it_again(run: Callable[..., Child]) -> None:
    child = run("raise SystemExit(1)")
    await until(lambda: child.restarts >= 2)
    await child.stop()
    count = len(child.exits)
    await asyncio.sleep(0.5)
    assert len(child.exits) == count
    assert child.pid is None


async def test_a_program_that_is_not_there_counts_as_a_failed_start(tmp_path: Path) -> None:
    spec = ProcessSpec("child", [str(tmp_path / "missing")], tmp_path / "child.log", _ready)
    child = Child(spec, lambda: None, lambda text: None)
    child.start()
    await until(lambda: len(child.exits) >= 2)
    await child.stop()
    assert set(child.exits) == {127}


async def test_a_process_has_a_session_of_its_own(run: Callable[..., Child]) -> None:
    child = run(SLEEPER)
    await child.is_ready.wait()
    assert child.pid is not None
    assert os.getsid(child.pid) == child.pid


def test_a_log_over_its_bound_moves_aside_and_a_writer_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "x.log"
    with path.open("ab") as writer:
        writer.write(b"a" * (LOG_BYTES_MAX + 1))
        writer.flush()
        bound_log(path)
        writer.write(b"new\n")
    assert path.read_bytes() == b"new\n"
    assert (tmp_path / "x.log.1").stat().st_size == LOG_BYTES_MAX + 1


def test_a_leashed_program_ends_when_its_parent_is_killed(tmp_path: Path) -> None:
    pid_file = tmp_path / "pid"
    program = (
        f"import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    )
    command = leashed("SIGTERM", [sys.executable, "-c", program])
    parent = subprocess.Popen([sys.executable, "-c", f"import subprocess; subprocess.run({command!r})"])
    deadline = time.monotonic() + 20
    while not (pid_file.exists() and pid_file.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process = psutil.Process(int(pid_file.read_text()))
    parent.kill()
    parent.wait()
    process.wait(10)


@pytest.mark.parametrize(("end", "code"), [("raise SystemExit(7)", 7), ("import os; os.kill(os.getpid(), 9)", 137)])
def test_a_leash_passes_on_how_the_program_ended(end: str, code: int) -> None:
    assert subprocess.run(leashed("SIGTERM", [sys.executable, "-c", end])).returncode == code
