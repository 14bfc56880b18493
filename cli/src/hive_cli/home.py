"""The folder of an installation: where things stand in it, its settings without secrets, and its lock."""

import contextlib
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
from hive_common.contracts.events import Tier
from hive_common.contracts.limits import APPROVAL_MS
from hive_common.inference.config import BackEndConfig, CacheConfig
from hive_common.inference.providers import ProviderConfig
from hive_common.kernel.errors import FailedPrecondition, InvalidArgument
from hive_common.ops.config import read_secret
from hive_executor.config import OLLAMA_URL

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
    """An executor of this machine: its process name and its id, made once, and what it says for placement.

    `device` names another machine than the one that it runs on (`ExecutorConfig.device`).
    """

    name: str
    id: str
    tier: Tier = "worker"
    labels: dict[str, str] = {}
    device: str = ""


class ModelSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """How models may be called with the owner's key.

    Attributes:
        pin: where the data of calls may go: `own-devices`, `pool`, `region:<r>` or `any`.
        counts_only: keep no prompt and no completion in the log, only how much was used.
        ollama_without_key: programs of this machine may use the Ollama paths without the key.
        urls: where servers of models may answer on this machine, or next to it: base URLs, or objects with `url`,
            `key_file` with what has to be shown there, and `ca_file` with whom to trust there.
        small: a small real model is served on this machine.
        cloud: calls with the owner's key, and jobs submitted with it, may go to `providers`, within a budget.
        cache: where answers to calls at temperature 0 with a seed are kept, and for how long; nowhere without it.
    """

    pin: str = "any"
    counts_only: bool = False
    cloud: bool = False
    ollama_without_key: bool = False
    urls: tuple[str | BackEndConfig, ...] = (OLLAMA_URL,)
    small: bool = False
    cache: CacheConfig | None = None


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`hive.json`: what a home's first `up` chose and every later one uses. No secrets.

    `public` is the address under which other machines connect, empty where none may; `providers` are of models
    outside, which cost money. `approval_ms` is how long people may take to decide what agents ask, and how long
    that holds for later attempts of the same task.
    """

    owner: str
    endpoints: Endpoints
    ports: dict[str, int]
    executors: tuple[ExecutorEntry, ...]
    public: str = ""
    models: ModelSettings = ModelSettings()
    providers: tuple[ProviderConfig, ...] = ()
    approval_ms: int = APPROVAL_MS
    version: int = SETTINGS_VERSION


class JoinedSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """`joined.json`: which installation this home's executor belongs to. No secrets.

    Attributes:
        gateway: base URL of REST there.
        nats: URL of NATS there.
        owner: pseudonym of who owns this machine.
        executor: its name, for people, its id, and its tier.
        ports: that this home listens on, on the loopback.
        slots: guests that run at the same time; 0 is as many as there are cores.
        labels: for placement, besides those of `executor`.
        model_urls: where servers of models may answer, as in `ModelSettings.urls`; empty takes Ollama's.
        counts_only: of model calls of this machine no prompt and no answer are kept in the log.
        small_model: a small real model is served on this machine.
        token_public_key: verifies capability tokens of that installation.
        kill_public_key: verifies its kill orders.
    """

    gateway: str
    nats: str
    owner: str
    executor: ExecutorEntry
    ports: dict[str, int]
    slots: int = 0
    labels: dict[str, str] = {}
    model_urls: tuple[str | BackEndConfig, ...] = ()
    counts_only: bool = False
    small_model: bool = False
    token_public_key: str = ""
    kill_public_key: str = ""
    version: int = SETTINGS_VERSION


def providers_of(settings: Settings, home: "Home") -> tuple[ProviderConfig, ...]:
    """Return the providers with the paths of their keys, which may stand there relative to the home."""
    return tuple(msgspec.structs.replace(one, key_file=str(home.root / one.key_file)) for one in settings.providers)


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
    def joined_file(self) -> Path:
        """The same, of a home whose executor has joined an installation elsewhere."""
        return self.root / "joined.json"

    @property
    def credentials_file(self) -> Path:
        """NATS credentials of the executor of a joined home, mode 0600."""
        return self.secret_file("executor.creds")

    @property
    def ca_file(self) -> Path:
        """Certificate of the CA: of this installation, or of the one that was joined over TLS."""
        return self.tls_dir / "ca.pem"

    @property
    def api_key_file(self) -> Path:
        """Key of the owner for the gateway, mode 0600."""
        return self.root / "api-key"

    @property
    def kill_key_file(self) -> Path:
        """Private key of kill orders, mode 0600. `hive kill` alone reads it; services have the public key."""
        return self.secret_file("kill-key")

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
    def agent_keys_dir(self) -> Path:
        """Keys for signing agents; mode 0700."""
        return self.root / "keys" / "agents"

    @property
    def config_dir(self) -> Path:
        """One JSON file per process, written at every `up`."""
        return self.root / "config"

    def config_file(self, process: str) -> Path:
        """Return the configuration of a process."""
        return self.config_dir / f"{process}.json"

    @property
    def nats_config_file(self) -> Path:
        """Configuration of the NATS server. It says whom the server trusts: mode 0600."""
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
    def nats_accounts_dir(self) -> Path:
        """What the NATS server was told of its accounts while it ran: revocations, that is."""
        return self.nats_dir / "accounts"

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
        """Say whether an `up` has set an installation up in this home."""
        return self.settings_file.is_file()

    def is_joined(self) -> bool:
        """Say whether this home has joined an installation elsewhere."""
        return self.joined_file.is_file()

    def settings(self) -> Settings:
        """Read `hive.json`.

        Raises:
            InvalidArgument: it cannot be read or does not have the expected fields.
            FailedPrecondition: the installation is another one, which this home has joined.
        """
        if self.is_joined():
            raise elsewhere(self)
        return _read(self.settings_file, Settings)

    def joined(self) -> JoinedSettings:
        """Read `joined.json`. Raises InvalidArgument where that is not possible."""
        return _read(self.joined_file, JoinedSettings)

    def ports(self) -> dict[str, int]:
        """Return the recorded ports, of either kind of home. Raises InvalidArgument."""
        return self.joined().ports if self.is_joined() else self.settings().ports

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


S = TypeVar("S", Settings, JoinedSettings)


def elsewhere(home: Home) -> FailedPrecondition:
    """Return what to say to a command that needs the control plane, in a home that only has an executor."""
    gateway = home.joined().gateway
    return FailedPrecondition(
        f"{home.root} is a device that has joined {gateway}: it holds no key for that; "
        "run this on the machine where that installation was started",
        gateway=gateway,
    )


def _read(file: Path, kind: type[S]) -> S:
    try:
        found = msgspec.json.decode(file.read_bytes(), type=kind)
    except OSError as error:
        raise InvalidArgument(f"{file}: cannot be read: {error.strerror}", file=str(file)) from error
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"{file}: {error}", file=str(file)) from error
    except msgspec.DecodeError as error:
        raise InvalidArgument(
            f"{file}: is not JSON: {error}; expected what `hive` wrote there", file=str(file)
        ) from error
    if found.version != SETTINGS_VERSION:
        raise InvalidArgument(f"{file}: $.version is {found.version}, expected {SETTINGS_VERSION}", file=str(file))
    return found


def find_home(chosen: Path | None) -> Home:
    """Return the home that `--home`, HIVE_HOME or the default names, in this order."""
    named = chosen or Path(os.environ.get(HOME_VARIABLE) or DEFAULT_HOME)
    return Home(Path(os.path.abspath(named.expanduser())))  # noqa: PTH100 - resolve() would follow links
