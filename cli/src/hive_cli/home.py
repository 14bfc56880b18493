"""The folder of an installation: where things stand in it, its settings without secrets, and its lock."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument
from hive_common.ops.config import read_secret

HOME_VARIABLE = "HIVE_HOME"
DEFAULT_HOME = "~/.hivefabric"
SETTINGS_VERSION = 1
# A reader of the lock holds it for microseconds; a starter must not take that for a running supervisor.
_LOCK_PATIENCE_S = 0.5


class Endpoints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where programs connect.

    `postgres` is a libpq URI of the administrator that names a password file of mode 0600 instead of holding
    the password.
    """

    http: str
    grpc: str
    nats: str
    postgres: str


class ExecutorEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An executor of this machine: its process name and its id, made once."""

    name: str
    id: str


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`hive.json`: what a home's first `up` chose and every later one uses. No secrets.

    `public` is the address under which other machines connect, empty where none may.
    """

    owner: str
    endpoints: Endpoints
    ports: dict[str, int]
    executors: tuple[ExecutorEntry, ...]
    public: str = ""
    version: int = SETTINGS_VERSION


class HomeInUse(FailedPrecondition):
    """Another supervisor runs this home. `fields`: `pid`."""


class Home:
    """Paths of an installation.

    Args:
        root: made by the first `hive up`.
    """

    def __init__(self, root: Path) -> None:
        self.root = root

    @property
    def settings_file(self) -> Path:
        """Endpoints, ports and executors, as JSON."""
        return self.root / "hive.json"

    @property
    def api_key_file(self) -> Path:
        """Key of the owner for the gateway, mode 0600."""
        return self.root / "api-key"

    @property
    def prometheus_file(self) -> Path:
        """Configuration a Prometheus can be started with."""
        return self.root / "prometheus.yml"

    @property
    def secrets_dir(self) -> Path:
        """Keys and passwords that processes share; mode 0700."""
        return self.root / "secrets"

    def secret_file(self, name: str) -> Path:
        """Return the file of one secret, such as `service-key`."""
        return self.secrets_dir / name

    @property
    def tls_dir(self) -> Path:
        """Certificates. Their keys are secrets."""
        return self.root / "tls"

    @property
    def config_dir(self) -> Path:
        """One JSON file per process, written at every `up`."""
        return self.root / "config"

    def config_file(self, process: str) -> Path:
        """Return the configuration of a process."""
        return self.config_dir / f"{process}.json"

    @property
    def nats_config_file(self) -> Path:
        """Configuration of the NATS server. It holds passwords: mode 0600."""
        return self.config_dir / "nats.conf"

    @property
    def postgres_dir(self) -> Path:
        """The cluster."""
        return self.root / "data" / "postgres"

    @property
    def nats_dir(self) -> Path:
        """JetStream's store; everything in it can be made anew from the log."""
        return self.root / "data" / "nats"

    @property
    def artifacts_dir(self) -> Path:
        """The artifact store, an OCI image layout."""
        return self.root / "artifacts"

    def executor_dir(self, name: str) -> Path:
        """Return the folder of an executor: its spool."""
        return self.root / "executors" / name

    @property
    def logs_dir(self) -> Path:
        """One log file per process."""
        return self.root / "logs"

    def log_file(self, process: str) -> Path:
        """Return the log of a process."""
        return self.logs_dir / f"{process}.log"

    @property
    def run_dir(self) -> Path:
        """What is true only while a supervisor runs."""
        return self.root / "run"

    @property
    def lock_file(self) -> Path:
        """Locked (flock) by the running supervisor, whose pid it holds."""
        return self.run_dir / "lock"

    @property
    def pid_file(self) -> Path:
        """Pid of the supervisor that ran last."""
        return self.run_dir / "supervisor.pid"

    @property
    def state_file(self) -> Path:
        """Processes as the supervisor sees them."""
        return self.run_dir / "state.json"

    def exists(self) -> bool:
        """Say whether an `up` has set this home up."""
        return self.settings_file.is_file()

    def settings(self) -> Settings:
        """Read `hive.json`.

        Raises:
            InvalidArgument: it cannot be read or does not have the expected fields.
        """
        file = self.settings_file
        try:
            found = msgspec.json.decode(file.read_bytes(), type=Settings)
        except OSError as error:
            raise InvalidArgument(f"{file}: cannot be read: {error.strerror}", file=str(file)) from error
        except msgspec.ValidationError as error:
            raise InvalidArgument(f"{file}: {error}", file=str(file)) from error
        except msgspec.DecodeError as error:
            raise InvalidArgument(
                f"{file}: is not JSON: {error}; expected what `hive up` wrote there", file=str(file)
            ) from error
        if found.version != SETTINGS_VERSION:
            raise InvalidArgument(
                f"{file}: $.version is {found.version}, expected {SETTINGS_VERSION}", file=str(file)
            )
        return found

    def api_key(self) -> str:
        """Read the owner's key. Raises InvalidArgument where that is not possible."""
        return read_secret(self.api_key_file)

    def supervisor_pid(self) -> int | None:
        """Return the pid of the running supervisor, 0 where it is only just starting, None where none runs."""
        try:
            descriptor = os.open(self.lock_file, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            text = os.pread(descriptor, 32, 0).strip()
            return int(text) if text.isdigit() else 0
        else:
            return None
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold this home for as long as the block runs. The system gives the lock back if the process dies.

        Raises:
            HomeInUse: another supervisor holds it.
        """
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.run_dir.mkdir(exist_ok=True, mode=0o700)
        descriptor = os.open(self.lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            self._take(descriptor)
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
            yield
            os.ftruncate(descriptor, 0)
        finally:
            os.close(descriptor)

    def _take(self, descriptor: int) -> None:
        until = time.monotonic() + _LOCK_PATIENCE_S
        while True:
            try:
                return fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > until:
                    break
            time.sleep(0.02)
        text = os.pread(descriptor, 32, 0).strip().decode(errors="replace") or "starting"
        raise HomeInUse(
            f"{self.root}: in use by a running supervisor (pid {text}); stop it with: hive down --home {self.root}",
            pid=text,
        )


def find_home(chosen: Path | None) -> Home:
    """Return the home that `--home`, HIVE_HOME or the default names, in this order."""
    named = chosen or Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)
    return Home(Path(os.path.abspath(named.expanduser())))  # noqa: PTH100 - resolve() would follow links
