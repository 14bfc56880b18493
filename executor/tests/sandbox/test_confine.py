import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import psutil
import pytest
from hive_executor.sandbox import RunnerPool
from hive_executor.sandbox.confine import EMPTY_ROOT, LAYERS, NAMESPACES, PROCESSES, SYSCALL_FILTER

from .conftest import limits, python

ECHO = python("def run(input):\n    return input")
REPORT = json.loads(subprocess.check_output([sys.executable, "-m", "hive_executor.sandbox.layers"], text=True))
AVAILABLE = [one["name"] for one in REPORT if one["has"]]


def needs(layer: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(layer not in AVAILABLE, reason=f"this system allows no {layer}")


@pytest.fixture
async def pid(pool: RunnerPool) -> AsyncIterator[int]:
    """A runner that has run something; it must still be able to afterwards."""
    assert (await pool.run(ECHO, b"{}", limits())).status == "succeeded"
    yield pool.stats()["pids"][0]
    assert (await pool.run(ECHO, b"{}", limits())).status == "succeeded"
    assert pool.stats()["restarts"] == 0


async def test_the_pool_says_which_layers_its_runners_have(pool: RunnerPool) -> None:
    assert pool.stats()["layers"] == AVAILABLE
    assert [one["name"] for one in REPORT] == list(LAYERS)
    assert all(bool(one["fix"]) != one["has"] for one in REPORT)


async def test_runner_has_no_environment_and_no_descriptors_of_ours(pid: int) -> None:
    assert set(psutil.Process(pid).environ()) == {"LC_ALL", "PYTHONDONTWRITEBYTECODE", "PYTHONUNBUFFERED"}
    assert psutil.Process(pid).rlimit(psutil.RLIMIT_CORE) == (0, 0)
    links = {int(link.name): str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    assert links.pop(0).startswith("socket:")
    assert links.pop(1) == "/dev/null"
    assert links.pop(2).endswith(" (deleted)")  # its stderr, a file without a name
    (stops,) = (number for number, link in links.items() if link.startswith("pipe:"))
    flags = Path(f"/proc/{pid}/fdinfo/{stops}").read_text().split("flags:")[1].split()[0]
    assert int(flags, 8) & os.O_ACCMODE == os.O_RDONLY
    del links[stops]
    # The rest it made itself: its channel again, its memory figures, modules, and what the engine needs.
    assert {number: link for number, link in links.items() if not _is_runners_own(link, pid)} == {}
    assert len([link for link in links.values() if link.startswith("socket:")]) <= 3


def _is_runners_own(link: str, pid: int) -> bool:
    return link.startswith(("socket:", "anon_inode:", "/memfd:")) or link.endswith((f"/{pid}/statm", ".cwasm"))


async def test_a_secret_that_its_parent_has_open_is_not_inherited(cache_dir: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("key")
    handle = os.open(secret, os.O_RDONLY)
    os.set_inheritable(handle, True)
    pool = RunnerPool(size=1, cache_dir=cache_dir)
    try:
        await pool.start()
        (pid,) = pool.stats()["pids"]
        assert str(secret) not in {str(link.readlink()) for link in Path(f"/proc/{pid}/fd").iterdir()}
    finally:
        await pool.close()
        os.close(handle)


@needs(NAMESPACES)
async def test_runner_is_in_namespaces_of_its_own(pid: int) -> None:
    for kind in ("user", "net", "ipc", "mnt", "uts"):
        assert Path(f"/proc/{pid}/ns/{kind}").readlink() != Path(f"/proc/self/ns/{kind}").readlink()
    interfaces = Path(f"/proc/{pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]


def _numbers(pid: int) -> list[int]:
    status = Path(f"/proc/{pid}/status").read_text().splitlines()
    return [int(number) for line in status if line.startswith("NSpid:") for number in line.split()[1:]]


@needs(PROCESSES)
async def test_runner_is_the_first_and_only_process_of_its_namespace(pid: int) -> None:
    assert _numbers(pid)[-1] == 1
    space = Path(f"/proc/{pid}/ns/pid").readlink()
    assert space != Path("/proc/self/ns/pid").readlink()
    assert [number for number in psutil.pids() if _space_of(number) == space] == [pid]
    keeper = psutil.Process(pid).parent()
    assert keeper is not None
    assert (keeper.name(), keeper.ppid(), psutil.Process(pid).name()) == ("hive-keeper", os.getpid(), "hive-runner")


def _space_of(pid: int) -> Path | None:
    try:
        return Path(f"/proc/{pid}/ns/pid").readlink()
    except OSError:
        return None


@needs(PROCESSES)
async def test_keeper_holds_neither_the_channel_nor_a_file(pid: int) -> None:
    keeper = psutil.Process(pid).ppid()
    links = {int(link.name): str(link.readlink()) for link in Path(f"/proc/{keeper}/fd").iterdir()}
    assert (links.pop(0), links.pop(1)) == ("/dev/null", "/dev/null")
    assert links.pop(2).endswith(" (deleted)")
    assert {link.split(":")[0] for link in links.values()} <= {"pipe", "/dev/null"}


@needs(EMPTY_ROOT)
async def test_runner_sees_compiled_modules_and_nothing_else(pid: int, cache_dir: Path) -> None:
    root = Path(f"/proc/{pid}/root")
    assert [child.name for child in root.iterdir()] == [cache_dir.parts[1]]
    inside = Path(f"{root}{cache_dir}")
    assert [child.name for child in inside.iterdir()] == ["code"]
    assert {child.suffix for child in (inside / "code").iterdir()} == {".cwasm"}
    for place in (root, inside / "code"):
        with pytest.raises(OSError, match="Read-only"):
            (place / "new").touch()
    effective = [
        line.split()[1] for line in Path(f"/proc/{pid}/status").read_text().splitlines() if "CapEff" in line
    ]
    assert effective == ["0000000000000000"]


@needs(SYSCALL_FILTER)
async def test_every_thread_of_a_runner_has_the_filter(pid: int) -> None:
    for thread in Path(f"/proc/{pid}/task").iterdir():
        facts = dict(line.split(":\t", 1) for line in (thread / "status").read_text().splitlines() if ":\t" in line)
        assert facts["Seccomp"] == "2"
        assert facts["NoNewPrivs"] == "1"


ATTEMPTS = """
import ctypes, errno, fcntl, os, signal, socket, sys, threading
from pathlib import Path
from hive_executor.sandbox import confine
libc = ctypes.CDLL(None, use_errno=True)
if user := int(sys.argv[3]):
    # Only now: others may not be able to read where this project lies.
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)
    libc.prctl(4, 1)  # PR_SET_DUMPABLE: as after an exec, what it has in /proc is its own
layers = confine.isolate()
confine.die_with_parent()
confine.close_off(layers, visible=None, mount_point=Path(sys.argv[1]), scratch_bytes=int(sys.argv[2]))
parent = os.getppid()
def refused(name, attempt):
    try:
        attempt()
    except OSError as error:
        print(name, errno.errorcode[error.errno])
    else:
        print(name, "WORKED")
def call(name, *arguments):
    def attempt():
        if getattr(libc, name)(*arguments) < 0:
            raise OSError(ctypes.get_errno(), name)
    refused(name, attempt)
refused("fork", os.fork)
refused("exec", lambda: os.execv("/bin/true", ["true"]))
refused("socket", lambda: socket.socket())
refused("kill", lambda: os.kill(parent, 0))
call("tgkill", parent, parent, 0)
refused("limits of another", lambda: __import__("resource").prlimit(parent, 7))
refused("signals by descriptor", lambda: fcntl.fcntl(0, fcntl.F_SETOWN, parent))
refused("write a file", lambda: open("/new", "w"))
refused("write by openat", lambda: os.open("/dev/null", os.O_RDWR))
call("ptrace", 16, parent, 0, 0)
call("mount", b"x", b"/", b"tmpfs", 0, None)
call("unshare", 0x10000000)
call("chroot", b"/")
call("setuid", 0)
call("process_vm_readv", parent, None, 0, None, 0, 0)
worked = []
thread = threading.Thread(target=worked.append, args=(1,))
thread.start(); thread.join()
print("thread", "WORKED" if worked else "failed")
"""


@needs(SYSCALL_FILTER)
@pytest.mark.parametrize("scratch_bytes", [0, 65_536])
@pytest.mark.parametrize("user", [0, 65_534])
async def test_what_a_confined_process_may_still_ask_of_the_system(
    user: int, scratch_bytes: int, tmp_path: Path
) -> None:
    if user and os.geteuid() != 0:
        pytest.skip("becoming another user takes root")
    tmp_path.chmod(0o755)
    given = (str(tmp_path), str(scratch_bytes), str(user))
    child = await asyncio.create_subprocess_exec(
        *(sys.executable, "-P", "-c", ATTEMPTS, *given), stdout=-1, stderr=-1
    )
    async with asyncio.timeout(60):
        stdout, stderr = await child.communicate()
    said = dict(line.rsplit(" ", 1) for line in stdout.decode().splitlines())
    assert said.pop("thread", None) == "WORKED", stderr.decode()
    assert len(said) == 15
    # With a folder for files, files elsewhere are kept away by the mounts: read-only, or not there.
    codes = {"EPERM", "EACCES", *(("EROFS", "ENOENT") if scratch_bytes else ())}
    assert {name: code for name, code in said.items() if code not in codes} == {}


@pytest.mark.parametrize(
    ("refused", "missing"),
    [
        ("max_pid_namespaces", {PROCESSES}),
        ("max_user_namespaces", {NAMESPACES, PROCESSES, EMPTY_ROOT}),
    ],
)
@needs(PROCESSES)
async def test_what_a_system_refuses_is_missing_and_the_rest_is_there(
    refused: str, missing: set[str], cache_dir: Path
) -> None:
    if shutil.which("unshare") is None:
        pytest.skip("takes unshare of util-linux")
    # These limits hold below the user namespace in which they are set, and go with it.
    script = f'echo 0 > /proc/sys/user/{refused}; "$0" -P -m hive_executor.sandbox.layers; exec "$0" -c "$1" "$2"'
    run = (
        "import asyncio, json, sys\nfrom pathlib import Path\nfrom hive_executor.sandbox import *\n"
        "async def main():\n"
        "    pool = RunnerPool(size=1, cache_dir=Path(sys.argv[1]))\n    await pool.start()\n"
        "    program = Program('python', 'test:refused', 'agent.py', {'agent.py': b'def run(input): return {}'})\n"
        "    outcome = await pool.run(program, b'{}', Limits(20000, 1 << 26, 1 << 40))\n"
        "    print(json.dumps([pool.stats()['layers'], outcome.output.decode()]))\n    await pool.close()\n"
        "asyncio.run(main())"
    )
    command = ["unshare", "--user", "--map-root-user", "sh", "-c", script, sys.executable, run, str(cache_dir)]
    child = await asyncio.create_subprocess_exec(*command, stdout=-1, stderr=-1)
    async with asyncio.timeout(60):
        stdout, stderr = await child.communicate()
    assert child.returncode == 0, stderr.decode()
    report, (layers, output) = map(json.loads, stdout.splitlines())
    assert {one["name"] for one in report if not one["has"]} == missing | set(LAYERS) - set(AVAILABLE)
    assert set(LAYERS) - set(layers) == missing | set(LAYERS) - set(AVAILABLE)
    assert output == "{}"
