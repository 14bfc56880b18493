"""A scripted back end in a process of its own, so that its work does not count as that of what is measured."""

import sys
import urllib.request
from pathlib import Path
from typing import Any, Self

import msgspec

from hive_common.ops.ports import free_port
from hive_common.testing.process import ServerProcess
from hive_common.testing.scripted.script import Counts, Script


class ScriptedProcess:
    """`python -m hive_common.testing.scripted`, on a free loopback port.

    Args:
        directory: gets its log.
        script: what it plays; `play` changes it.
    """

    def __init__(self, directory: Path, script: Script | None = None) -> None:
        self._script = script or Script()
        self.port = free_port()
        command = [sys.executable, "-P", "-m", "hive_common.testing.scripted", "--port", str(self.port)]
        self._process = ServerProcess(command, directory / f"scripted-{self.port}.log")

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def start(self) -> None:
        """Start, and wait until it answers."""
        self._process.start(self._answers)
        self.play(**msgspec.to_builtins(self._script))

    def stop(self) -> None:
        """End it."""
        self._process.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def play(self, **changes: Any) -> None:
        """Change the script for the calls that come from now on."""
        self._ask("script", msgspec.json.encode(changes))

    @property
    def counts(self) -> Counts:
        """What has happened since the start."""
        return msgspec.json.decode(self._ask("counts"), type=Counts)

    def _ask(self, what: str, body: bytes | None = None) -> bytes:
        with urllib.request.urlopen(f"{self.url}/scripted/{what}", body, timeout=10) as answer:  # noqa: S310
            found: bytes = answer.read()
            return found

    def _answers(self) -> bool:
        try:
            return bool(self._ask("counts"))
        except OSError:
            return False
