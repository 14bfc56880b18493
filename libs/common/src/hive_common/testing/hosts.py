"""Two machines on one: each with a network and mounts of its own, and a cable between them.

with Hosts() as hosts:
    subprocess.run([*hosts.control.prefix, "hive", "up", "--detach", "--public", hosts.control.address])
    hosts.cut(); ...; hosts.mend()

Unlike those of `faults.Wire`, these hosts reach each other's addresses as they are, and nothing of each other's
loopback or home.
"""

import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from types import TracebackType
from typing import Final, Self

_NETWORK: Final = "10.203.78"
_PATIENCE_S: Final = 20.0
_KINDS: Final = ("net", "mnt")


class Host:
    """A machine: a process that does nothing holds its namespaces.

    Attributes:
        address: of its end of the cable.
        folder: for its homes; empty for the other machine.
        prefix: stands before every command that runs there, which keeps its pid.
        network: file of its network namespace.
    """

    def __init__(self, number: int, folder: Path, other: Path) -> None:
        self.address = f"{_NETWORK}.{number}"
        self.folder = folder
        self._holder = subprocess.Popen(
            ["unshare", "--net", "--mount", "--propagation", "private", "sleep", "infinity"]
        )
        pid = self._holder.pid
        self.pid = pid
        self.prefix = ("nsenter", f"--target={pid}", "--net", "--mount", "--")
        self.network = Path(f"/proc/{pid}/ns/net")
        until = time.monotonic() + _PATIENCE_S
        while any(_namespace(pid, kind) == _namespace("self", kind) for kind in _KINDS):
            assert self._holder.poll() is None, "unshare failed"
            assert time.monotonic() < until, "no namespaces within 20 s"
            time.sleep(0.01)
        self.run("ip", "link", "set", "lo", "up")
        self.run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(other))

    def run(self, *command: str, check: bool = True) -> str:
        """Run a system program there, and return what it printed."""
        done = subprocess.run([*self.prefix, *command], capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0 or not check, f"{command}: exit code {done.returncode}\n{done.stderr}"
        return done.stdout

    def end(self) -> None:
        """Let the namespaces go once the last process of them has ended."""
        self._holder.kill()
        self._holder.wait()


class Hosts:
    """The two machines `control` and `device`. Needs root, and the programs ip, nft, nsenter and unshare."""

    def __init__(self) -> None:
        # A short path: those of sockets are limited to some hundred bytes.
        self._folder = Path(tempfile.mkdtemp(prefix="hive-two-"))
        folders = self._folder / "c", self._folder / "d"
        for folder in folders:
            folder.mkdir()
        self.control = Host(1, folders[0], folders[1])
        self.device = Host(2, folders[1], folders[0])
        self._ends = ends = {self.control: "hive-c", self.device: "hive-d"}
        pids = str(self.control.pid), str(self.device.pid)
        one, other = ends.values()
        _run("ip", "link", "add", one, "netns", pids[0], "type", "veth", "peer", "name", other, "netns", pids[1])
        for host, end in ends.items():
            host.run("ip", "link", "set", end, "up")
            self.give_address(host)

    def give_address(self, host: Host) -> None:
        """Give a machine its address."""
        host.run("ip", "addr", "add", f"{host.address}/24", "dev", self._ends[host])

    def take_address(self, host: Host) -> None:
        """Take it away, as another network does to a laptop."""
        host.run("ip", "addr", "del", f"{host.address}/24", "dev", self._ends[host])

    def cut(self) -> None:
        """From now on packets vanish; nobody is told."""
        device = self.device.address
        for rule in (
            "add table ip cut",
            "add chain ip cut in { type filter hook input priority 0 ; }",
            "add chain ip cut out { type filter hook output priority 0 ; }",
            f"add rule ip cut in ip saddr {device} drop",
            f"add rule ip cut out ip daddr {device} drop",
        ):
            self.control.run("nft", rule)

    def mend(self) -> None:
        """Let everything through again."""
        self.control.run("nft", "delete", "table", "ip", "cut", check=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for host in (self.device, self.control):
            host.end()
        shutil.rmtree(self._folder, ignore_errors=True)


def _namespace(pid: int | str, kind: str) -> str:
    return str(Path(f"/proc/{pid}/ns/{kind}").readlink())


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, f"{command}: exit code {done.returncode}\n{done.stderr}"
