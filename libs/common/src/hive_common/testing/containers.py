"""The same servers for tests, in containers: what people run on a server, with the defaults of those images.

`HIVE_TEST_SERVERS=containers` makes the fixtures take these. The images are those of docker-compose.yml.
A container is removed when its `stop` is called; Ryuk, the watchdog of testcontainers, does so besides where the
environment allows it.
"""

import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hive_common.bus.authority import Authority
from hive_common.kernel.errors import Unavailable
from hive_common.ops.embedded import SUPERUSER
from hive_common.testing.identities import Issuer
from hive_common.testing.nats import greets
from hive_common.testing.postgres import PostgresServer

if TYPE_CHECKING:
    from testcontainers.core.container import DockerContainer

POSTGRES_IMAGE = "postgres:18"
NATS_IMAGE = "nats:2.15-alpine"
READY_WITHIN_S = 60.0


def engine_problem() -> str | None:
    """Return why containers cannot be used here, with what would help, or None."""
    try:
        import docker  # type: ignore[import-untyped]
        from docker.errors import DockerException  # type: ignore[import-untyped]
    except ImportError:
        return "the package testcontainers is not installed; `make setup` installs it"
    try:
        client = docker.from_env()
        client.ping()
        client.close()
    except DockerException as error:
        return f"no container engine answers ({error}); start Docker, or set DOCKER_HOST"
    return None


class _Server:
    """One container with one port, published on loopback; `shell` runs in place of what the image would."""

    def __init__(
        self, image: str, port: int, command: list[str], environment: dict[str, str], shell: str = ""
    ) -> None:
        self._image = image
        # Images of NATS differ in whether their entrypoint takes a shell for a command.
        self._options = {"entrypoint": ["sh", "-c", shell]} if shell else {}
        self._inside = port
        self._command = command
        self._environment = environment
        self._container: DockerContainer | None = None

    def run(self, is_ready: Callable[[int], bool]) -> int:
        """Start the container, wait until `is_ready` says so of its port, and return that.

        Raises:
            Unavailable: it did not get ready; the message carries the end of its log.
        """
        from testcontainers.core.container import DockerContainer

        container = DockerContainer(self._image).with_command(self._command).with_kwargs(**self._options)
        for name, value in self._environment.items():
            container.with_env(name, value)
        # An address besides the port is not in the annotation of the library, and is what Docker's client takes.
        container.ports[f"{self._inside}/tcp"] = ("127.0.0.1", None)  # type: ignore[assignment]
        self._container = container
        try:
            container.start()
            port = self._published(container)
            until = time.monotonic() + READY_WITHIN_S
            while not is_ready(port):
                if time.monotonic() > until:
                    raise Unavailable(f"{self._image} did not get ready; its log ends: {self._log()}")
                time.sleep(0.05)
            return port
        except BaseException:
            self.remove()
            raise

    def remove(self) -> None:
        """Remove the container and its volumes."""
        if self._container is not None:
            self._container.stop(force=True, delete_volume=True)
            self._container = None

    def _published(self, container: "DockerContainer") -> int:
        try:
            return int(container.get_exposed_port(self._inside))
        except ConnectionError as error:
            raise Unavailable(f"{self._image} ended at once; its log ends: {self._log()}") from error

    def _log(self) -> str:
        assert self._container is not None
        out, err = self._container.get_logs()
        return (out + err).decode(errors="replace")[-2000:]


class ContainerPostgres(PostgresServer):
    """PostgreSQL of the image `postgres:18`, with a random superuser password."""

    def __init__(self) -> None:
        self.password = secrets.token_urlsafe(18)
        environment = {"POSTGRES_USER": SUPERUSER, "POSTGRES_PASSWORD": self.password, "POSTGRES_DB": "postgres"}
        self._server = _Server(POSTGRES_IMAGE, 5432, ["postgres", "-c", "jit=off"], environment)

    def start(self) -> None:
        """Start the container and wait until it takes connections."""
        self._server.run(self._accepts_at)

    def stop(self) -> None:
        """Remove the container and its data."""
        self._server.remove()

    def _accepts_at(self, port: int) -> bool:
        self.port = port
        return self.accepts()


class ContainerNats:
    """A NATS server of the image `nats:2.15-alpine`, JetStream on.

    Args:
        authority: whose credentials it takes, and no others.
    """

    def __init__(self, authority: Authority) -> None:
        self.port = 0
        self.issuer = Issuer(authority, "")
        """Makes credentials that this server takes, once it runs."""
        text = authority.server_text(Path("/tmp/accounts"), int(time.time()))  # noqa: S108
        text += "jetstream { store_dir: /tmp/jetstream }\n"
        # Nothing in it is secret: public keys, and what they have signed.
        start = 'printf %s "$CONFIG" > /tmp/nats.conf && exec nats-server --config /tmp/nats.conf'
        self._server = _Server(NATS_IMAGE, 4222, [], {"CONFIG": text}, start)

    @property
    def url(self) -> str:
        """Where clients connect."""
        return f"nats://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Start the container and wait until it greets."""
        self.port = self._server.run(greets)
        self.issuer.url = self.url

    def stop(self) -> None:
        """Remove the container and its data."""
        self._server.remove()
