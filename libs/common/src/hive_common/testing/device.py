"""An executor that no supervisor watches: a device of its own, with its own network, clock and environment.

installation.hive("init", "--free-ports", "--executors", "2")
installation.up(executors=1)
with Device(installation, "executor-2", address=wire.address, prefix=wire.in_device([])) as device:
    ...
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import psutil

from hive_common.ops.ports import free_port
from hive_common.testing.installation import Installation, wait_until

_TEMPLATE = "executor-1"
_LOOPBACK = "127.0.0.1"


class Device:
    """A second executor of an installation, configured as its first one is, but for name, id and addresses.

    Args:
        installation: is up, with its first executor; it knows this one by name but does not run it.
        name: of this executor, such as `executor-2`.
        address: host at which the device reaches NATS and the gateway.
        prefix: stands before the command.
        environment: added to the environment.
        folder: holds its configuration, its log and, in `state`, its spool; by default they lie in the home.
    """

    def __init__(
        self,
        installation: Installation,
        name: str,
        *,
        address: str = _LOOPBACK,
        prefix: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
        folder: Path | None = None,
    ) -> None:
        self.name = name
        home = installation.home
        entries = json.loads((home / "hive.json").read_text())["executors"]
        ids = {entry["name"]: entry["id"] for entry in entries}
        self.id: str = ids[name]
        self.log_file = (folder or home / "logs") / f"{name}.log"
        self._installation = installation
        self._prefix = tuple(prefix)
        self._environment = {**os.environ, **(environment or {})}
        text = (home / "config" / f"{_TEMPLATE}.json").read_text()
        config = json.loads(text.replace(_TEMPLATE, name).replace(ids[_TEMPLATE], self.id))
        config["ops_port"] = free_port()
        config["models_port"] = 0
        config["blobs_url"] = config["blobs_url"].replace(_LOOPBACK, address)
        config["nats"]["url"] = config["nats"]["url"].replace(_LOOPBACK, address)
        if folder is not None:
            config["state_dir"] = str(folder / "state")
        self._config_file: Path = (folder or home / "config") / f"{name}.json"
        self._config_file.write_text(json.dumps(config))
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        """Pid of the executor."""
        assert self._process is not None
        return self._process.pid

    def ended(self) -> bool:
        """Say whether its process has ended, for whatever reason."""
        return self._process is None or self._process.poll() is not None

    def launch(self) -> None:
        """Start it. It ends with the process that started it."""
        command = [*self._prefix, sys.executable, "-P", "-m", "hive_executor", "--config", str(self._config_file)]
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(
                [*command, "--supervised"],
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                start_new_session=True,
            )

    def start(self) -> None:
        """Start it, and wait until the control plane sees it."""
        self.launch()
        wait_until(lambda: self.state()["state"] == "online", 90, f"{self.name} is online")

    def stop(self) -> None:
        """Ask it to end; kill it and everything below it when it does not."""
        process, self._process = self._process, None
        if process is None or process.poll() is not None:
            return
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        psutil.wait_procs(below, timeout=10)

    def state(self) -> dict[str, Any]:
        """Return how the control plane sees it: `state`, `slots`, `running`."""
        unseen: dict[str, Any] = {"state": "unseen", "slots": 0, "running": 0}
        try:
            found = self._installation.get("/v1/executors", limit=1000)["executors"]
        except OSError:
            return unseen
        return next((one for one in found if one["executor_id"] == self.id), unseen)
