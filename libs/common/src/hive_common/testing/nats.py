"""A real NATS server with JetStream for tests."""

import json
import signal
import socket
import time
from pathlib import Path

from hive_common.bus.authority import Authority
from hive_common.ops.embedded import nats_command
from hive_common.ops.ports import free_port
from hive_common.testing.identities import Issuer
from hive_common.testing.process import ServerProcess


class EmbeddedNats:
    """A NATS server in `directory`, on a free loopback port.

    Args:
        directory: gets `jetstream/`, `nats.conf` and `nats.log`.
        config_text: further configuration in NATS syntax (accounts, authorization), or None for an open server.
            It MUST NOT set the port, the host or the JetStream store.
        authority: whose credentials it takes, and no others; None leaves it open.
    """

    def __init__(self, directory: Path, config_text: str | None = None, authority: Authority | None = None) -> None:
        self.directory = directory
        self.port = free_port()
        self.store_dir = directory / "jetstream"
        self.log_file = directory / "nats.log"
        self._config_text = config_text or ""
        self._process: ServerProcess | None = None
        self.issuer = Issuer(authority or Authority.new(), self.url)
        """Makes credentials that this server takes."""
        if authority is not None:
            self._config_text += authority.server_text(directory / "accounts", int(time.time()))

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self.port}"

    @property
    def pid(self) -> int:
        """Process id of the server."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Write the configuration, start the server, and wait until it greets."""
        self.directory.mkdir(parents=True, exist_ok=True)
        config_file = self.directory / "nats.conf"
        store = json.dumps(str(self.store_dir))
        config_file.write_text(
            f'host: "127.0.0.1"\nport: {self.port}\njetstream {{ store_dir: {store} }}\n{self._config_text}\n'
        )
        config_file.chmod(0o600)
        self._process = ServerProcess(nats_command(config_file, die_with_parent=True), self.log_file)
        self._process.start(lambda: greets(self.port))

    def stop(self, with_signal: signal.Signals = signal.SIGTERM) -> None:
        """Stop the server."""
        if self._process is not None:
            self._process.stop(with_signal)
            self._process = None


def greets(port: int) -> bool:
    """Say whether a NATS server is at home on 127.0.0.1:`port`."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1) as conn:
            conn.settimeout(1)
            return conn.recv(5) == b"INFO "
    except OSError:
        return False
