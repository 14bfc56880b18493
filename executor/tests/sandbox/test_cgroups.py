"""Groups with limits, on real cgroups where this machine permits, and on folders that look like them elsewhere."""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest
from hive_executor.sandbox import LogLine, RunnerPool
from hive_executor.sandbox.cgroups import Group, Place, find_place

from .conftest import MIB, limits, python

PLACE = find_place()
real = pytest.mark.skipif(
    PLACE is None, reason="no cgroup may be made here: run it as root, or in a unit with Delegate=memory pids"
)


def groups(creator: int) -> set[Path]:
    """The groups that a process has made; others of this machine may come and go meanwhile."""
    assert PLACE is not None
    return {found for folder in PLACE.folders for found in folder.glob(f"hive-{creator}-*")}


def group_of(pid: int) -> Group:
    """The group of a runner."""
    assert PLACE is not None
    (names,) = {name for found in groups(os.getpid()) if pid in Group(1, (found,)).pids() for name in [found.name]}
    return Group(PLACE.version, tuple(folder / name for folder in PLACE.folders for name in [names]))


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.01)


def alive(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


@pytest.fixture
def group() -> Iterator[Group]:
    assert PLACE is not None
    group = PLACE.new_group(memory_bytes=64 * MIB, processes=16)
    yield group
    group.clear()


def run_inside(group: Group, script: str) -> "subprocess.CompletedProcess[str]":
    """Run a script in a process that waits until it has been moved in."""
    child = subprocess.Popen(
        [sys.executable, "-c", f"import sys\nsys.stdin.read(1)\n{script}"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    group.enter(child.pid)
    stdout, stderr = child.communicate("x", timeout=60)
    return subprocess.CompletedProcess(child.args, child.returncode, stdout, stderr)


@real
def test_more_memory_than_the_limit_ends_a_member(group: Group) -> None:
    if len(Path("/proc/swaps").read_text().splitlines()) > 1 and PLACE is not None and PLACE.version == 1:
        pytest.skip("version 1 counts no swap; swapoff -a would make this testable")
    done = run_inside(group, f"held = b'x' * {256 * MIB}\nprint(len(held))")
    assert (done.returncode, done.stdout) == (-signal.SIGKILL, ""), done
    assert group.killed_for_memory() == 1


@real
def test_less_memory_than_the_limit_is_had(group: Group) -> None:
    group.limit_memory(512 * MIB)
    assert run_inside(group, f"held = b'x' * {256 * MIB}\nprint(len(held))").stdout == f"{256 * MIB}\n"
    assert group.killed_for_memory() == 0


@real
def test_more_threads_than_the_limit_are_refused(group: Group) -> None:
    script = (
        "import threading\nstop = threading.Event()\ncount = 0\ntry:\n    for _ in range(64):\n"
        "        threading.Thread(target=stop.wait, daemon=True).start()\n        count += 1\n"
        "except RuntimeError:\n    pass\nprint(count)\nstop.set()"
    )
    assert run_inside(group, script).stdout == "15\n"


@real
def test_a_group_goes_only_when_it_is_empty(group: Group) -> None:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    group.enter(child.pid)
    assert group.pids() == {child.pid}
    assert not group.remove()
    group.clear()
    assert child.wait(30) == -signal.SIGKILL
    assert group.remove()
    assert not any(folder.exists() for folder in group.folders)


@real
async def test_each_runner_has_a_group_that_goes_with_it(cache_dir: Path) -> None:
    pool = RunnerPool(size=2, cache_dir=cache_dir)
    await pool.start()
    try:
        pids = pool.stats()["pids"]
        found = [group_of(pid) for pid in pids]
        assert [group.pids() for group in found] == [{pid} for pid in pids]
        for group in found:
            texts = {path.name: path.read_text().strip() for folder in group.folders for path in folder.iterdir()
                     if path.name in {"pids.max", "memory.max", "memory.limit_in_bytes"}}  # fmt: skip
            assert set(texts.values()) == {"64", str(512 * MIB)}
    finally:
        await pool.close()
    assert not groups(os.getpid())


@real
async def test_the_limit_follows_what_an_attempt_may_take(pool: RunnerPool) -> None:
    agent = python("def run(input):\n    return {}")
    (pid,) = pool.stats()["pids"]
    for mebibytes in (64, 32, 256):
        assert (await pool.run(agent, b"{}", limits(memory_bytes=mebibytes * MIB))).status == "succeeded"
        (text,) = [(folder / name).read_text() for folder in group_of(pid).folders
                   for name in ("memory.max", "memory.limit_in_bytes") if (folder / name).exists()]  # fmt: skip
        assert 0 <= int(text) - (512 + 64 + 2 * mebibytes + 4 * 8) * MIB <= 64 * MIB  # the rest is CPython's image


GROWS = python(
    "import time\ndef run(input):\n    print('up')\n    time.sleep(0.5)\n    held = []\n"
    "    while True:\n        held.append(bytes(1 << 20))\n"
)


@real
async def test_runner_over_the_limit_of_its_group_dies_with_the_reason(pool: RunnerPool) -> None:
    started = asyncio.Event()

    def squeeze(_: LogLine) -> None:
        group = group_of(pid)
        used = psutil.Process(pid).memory_full_info().uss
        group.limit_memory(used + 64 * MIB)
        started.set()

    (pid,) = pool.stats()["pids"]
    outcome = await pool.run(GROWS, b"{}", limits(memory_bytes=1024 * MIB), on_log=squeeze)
    assert started.is_set()
    assert outcome.code == "runner_died"
    assert "over the memory limit of its cgroup" in outcome.detail, outcome
    assert (await pool.run(python("def run(input):\n    return {}"), b"{}", limits())).status == "succeeded"


EXECUTOR = (
    "import asyncio, sys\nfrom pathlib import Path\nfrom hive_executor.sandbox import *\n"
    "LOOP = Program('python', 'test:loop', 'agent.py', {'agent.py': b'def run(input):\\n    while True: pass'})\n"
    "async def main():\n"
    "    pool = RunnerPool(size=2, cache_dir=Path(sys.argv[1]))\n    await pool.start()\n"
    "    run = asyncio.create_task(pool.run(LOOP, b'{}', Limits(600_000, 1 << 26, 1 << 60)))\n"
    "    await asyncio.sleep(0.1)\n"
    "    print(*pool.stats()['pids'], flush=True)\n    await run\nasyncio.run(main())"
)


async def executor_with_runners(cache_dir: Path) -> "tuple[asyncio.subprocess.Process, list[int]]":
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", EXECUTOR, str(cache_dir), stdout=-1)
    assert process.stdout is not None
    async with asyncio.timeout(60):
        pids = [int(word) for word in (await process.stdout.readline()).split()]
    assert len(pids) == 2
    return process, pids


@real
async def test_killing_an_executor_leaves_no_process_and_no_group(cache_dir: Path) -> None:
    executor, pids = await executor_with_runners(cache_dir)
    tree = [*pids, *(child.pid for child in psutil.Process(executor.pid).children(recursive=True))]
    assert len(groups(executor.pid)) == 2 * len(PLACE.folders if PLACE else ())
    executor.kill()
    await executor.wait()
    await until(lambda: not any(map(alive, tree)))
    await until(lambda: not groups(executor.pid))


@real
async def test_what_is_left_when_keepers_were_killed_too_goes_with_the_next_pool(cache_dir: Path) -> None:
    executor, pids = await executor_with_runners(cache_dir)
    keepers = [psutil.Process(pid).ppid() for pid in pids]
    executor.send_signal(signal.SIGSTOP)  # so that it cannot clear up for the keepers
    for keeper in keepers:
        os.kill(keeper, signal.SIGKILL)
    await until(lambda: not any(map(alive, pids)))
    # Once it has gone, any pool of this machine may clear up behind it.
    assert groups(executor.pid)
    executor.kill()
    await executor.wait()
    # A process may be over while the last of its threads is not.
    await until(lambda: not any(Group(1, (folder,)).pids() for folder in groups(executor.pid)))
    pool = RunnerPool(size=1, cache_dir=cache_dir)
    await pool.start()
    await pool.close()
    assert not groups(executor.pid)


@real
async def test_a_killed_keeper_takes_its_runner_along_and_both_are_replaced(cache_dir: Path) -> None:
    pool = RunnerPool(size=1, cache_dir=cache_dir)
    await pool.start()
    try:
        (pid,) = pool.stats()["pids"]
        os.kill(psutil.Process(pid).ppid(), signal.SIGKILL)
        await until(lambda: pool.stats()["pids"] not in ([], [pid]))
        assert not alive(pid)
        assert len(groups(os.getpid())) == len(PLACE.folders if PLACE else ())
    finally:
        await pool.close()
    assert not groups(os.getpid())


def folder_like_version_2(folder: Path, controllers: str = "cpu memory pids", enabled: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "cgroup.controllers").write_text(f"{controllers}\n")
    (folder / "cgroup.subtree_control").write_text(f"{enabled}\n")
    return folder


def proc(folder: Path, own: str, *mounts: str) -> Path:
    folder.mkdir()
    (folder / "cgroup").write_text(own)
    (folder / "mountinfo").write_text("".join(f"{line}\n" for line in mounts))
    return folder


def mounted(root: str, place: Path, kind: str = "cgroup2", options: str = "rw") -> str:
    return f"41 31 0:38 {root} {place} rw,nosuid shared:7 - {kind} cgroup {options}"


@pytest.fixture
def unmanaged(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A system whose groups systemd does not manage, whatever this one is."""
    monkeypatch.setattr("hive_executor.sandbox.cgroups._SYSTEMD", tmp_path / "no-systemd")


@pytest.mark.usefixtures("unmanaged")
def test_version_2_below_the_own_group_enables_its_controllers(tmp_path: Path) -> None:
    own = folder_like_version_2(tmp_path / "v2" / "a" / "b")
    found = find_place(proc(tmp_path / "proc", "0::/a/b\n", mounted("/", tmp_path / "v2")))
    assert found == Place(2, (own,))
    assert (own / "cgroup.subtree_control").read_text() == "+memory +pids"


@pytest.mark.usefixtures("unmanaged")
def test_version_2_beside_the_own_group_when_a_subgroup_was_delegated(tmp_path: Path) -> None:
    unit = folder_like_version_2(tmp_path / "v2" / "unit", enabled="memory pids")
    folder_like_version_2(unit / "main", controllers="")
    found = find_place(proc(tmp_path / "proc", "0::/unit/main\n", mounted("/", tmp_path / "v2")))
    assert found == Place(2, (unit,))


@pytest.mark.usefixtures("unmanaged")
def test_version_2_in_a_container_that_sees_only_its_part(tmp_path: Path) -> None:
    own = folder_like_version_2(tmp_path / "v2", enabled="memory pids")
    assert find_place(proc(tmp_path / "proc", "0::/c\n", mounted("/c", tmp_path / "v2"))) == Place(2, (own,))
    assert find_place(proc(tmp_path / "other", "0::/d\n", mounted("/c", tmp_path / "v2"))) is None


@pytest.mark.usefixtures("unmanaged")
def test_hybrid_systems_have_their_controllers_in_version_1(tmp_path: Path) -> None:
    folder_like_version_2(tmp_path / "unified", controllers="hugetlb")
    for name in ("memory", "pids"):
        (tmp_path / name / "a").mkdir(parents=True)
    found = find_place(
        proc(
            tmp_path / "proc",
            "8:pids:/a\n4:memory:/a\n9:name=systemd:/\n0::/\n",
            mounted("/", tmp_path / "unified"),
            mounted("/", tmp_path / "memory", "cgroup", "rw,memory"),
            mounted("/", tmp_path / "pids", "cgroup", "rw,pids"),
        )
    )
    assert found == Place(1, (tmp_path / "memory" / "a", tmp_path / "pids" / "a"))


def test_what_systemd_manages_and_did_not_delegate_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hive_executor.sandbox.cgroups._SYSTEMD", tmp_path)
    own = folder_like_version_2(tmp_path / "v2" / "a", enabled="memory pids")
    process = proc(tmp_path / "proc", "0::/a\n", mounted("/", tmp_path / "v2"))
    assert find_place(process) is None
    try:
        os.setxattr(own, "user.delegate", b"1")
    except OSError:
        pytest.skip("this file system keeps no extended attributes: set TMPDIR to one that does")
    assert find_place(process) == Place(2, (own,))


def test_systems_without_cgroups_have_no_place(tmp_path: Path) -> None:
    assert find_place(tmp_path / "nowhere") is None
    assert find_place(proc(tmp_path / "proc", "0::/\n", mounted("/", tmp_path, "tmpfs"))) is None
