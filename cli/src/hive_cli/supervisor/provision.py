"""Sets an installation up: folders, secrets, ports, ids. Everything is made once and kept afterwards."""

import secrets
import shutil
from pathlib import Path
from urllib.parse import quote

import msgspec
from hive_common.contracts.events import Tier
from hive_common.contracts.limits import APPROVAL_MS
from hive_common.inference.config import BackEndConfig
from hive_common.inference.providers import check_providers
from hive_common.kernel.errors import FailedPrecondition
from hive_common.kernel.ids import new_id
from hive_common.ops.config import read_secret, write_config
from hive_common.ops.embedded import SUPERUSER
from hive_common.ops.files import replace_file
from hive_executor.small_model import require_small_model

from hive_cli.author_keys import ensure_author
from hive_cli.home import Endpoints, ExecutorEntry, Home, ModelSettings, Settings, providers_of
from hive_cli.placing import with_labels
from hive_cli.supervisor import names, ports
from hive_cli.supervisor.network import LOOPBACK, Network

DATABASE = "hive"
POSTGRES_ADMIN = "postgres-admin"
PASSFILE = "pgpass"
SERVICE_KEY = "service-key"
TOKEN_KEY = "token-key"  # noqa: S105 - the name of a file
_SECRET_BYTES = 32
FREE_BYTES_MIN = 200 * 1024 * 1024
"""What a first start writes (cluster and its log, 60 MB), and some for the work."""


def postgres_secret(service: str) -> str:
    """Return the name of the secret with a service's database password."""
    return f"postgres-{service}"


def provision(
    home: Home,
    executors: int | None,
    *,
    public: str | None = None,
    ollama_without_key: bool | None = None,
    model_urls: tuple[str | BackEndConfig, ...] | None = None,
    counts_only: bool | None = None,
    small_model: bool | None = None,
    tier: Tier | None = None,
    labels: dict[str, str] | None = None,
    preferred_ports: bool = True,
    network: Network = LOOPBACK,
) -> Settings:
    """Make what the home does not have yet, and return its settings. The caller holds the home's lock.

    Args:
        home: may not exist yet.
        executors: how many; None is as many as last time, or one.
        public: parsed address under which other machines connect; None is as last time, empty for none.
        ollama_without_key: whether the Ollama paths need no key on this machine; None is as last time.
        model_urls: where servers of models may answer; None is as last time.
        counts_only: whether the log keeps no prompt and no answer; None is as last time.
        small_model: whether a small real model is served here; None is as last time.
        tier: of every executor here; None is as last time.
        labels: for every executor here, besides those it has; empty values take labels away.
        preferred_ports: take 8500, 8501 and 4222 where they are free; else any free ones.
        network: decides about ports, and about the addresses that are recorded.

    Raises:
        FailedPrecondition: a recorded port is taken, the disk is full, or the small model is not installed.
        InvalidArgument: a provider in `hive.json` cannot be used; says which, and what is missing.
        OSError: something cannot be written.
    """
    _make_folders(home)
    _check_space(home.root)
    known = home.settings() if home.exists() else None
    if known is not None and not network.by_name:
        ports.check_recorded(_listened(known, executors), home.settings_file)
    if public is None:
        public = known.public if known else ""
    wished = {
        "ollama_without_key": ollama_without_key,
        "urls": model_urls,
        "counts_only": counts_only,
        "small": small_model,
    }
    models = msgspec.structs.replace(
        known.models if known else ModelSettings(),
        **{name: value for name, value in wished.items() if value is not None},
    )
    if models.small:
        require_small_model()
    if known is not None:
        check_providers(providers_of(known, home), f"{home.settings_file}: providers")
    addresses: tuple[str, ...] = ()
    if public and not network.by_name:
        from hive_cli.supervisor.public import listened

        addresses = listened(public)
    settings = _settle(home, known, executors, models, public, preferred_ports, network, addresses)
    placed = tuple(
        msgspec.structs.replace(entry, tier=tier or entry.tier, labels=with_labels(entry.labels, labels))
        for entry in settings.executors
    )
    settings = msgspec.structs.replace(settings, executors=placed)
    ports.check_public(settings.ports, addresses, home.settings_file)
    if public:
        # Loaded where it is used: every command passes here, and few need the cryptography.
        from hive_cli.supervisor.ca import ensure_certificates

        ensure_certificates(home, public)
    _make_secrets(home)
    if settings != known:
        write_config(home.settings_file, settings)
    for entry in settings.executors:
        home.executor_dir(entry.name).mkdir(parents=True, exist_ok=True, mode=0o700)
    return settings


def active_executors(settings: Settings, executors: int | None) -> tuple[ExecutorEntry, ...]:
    """Return the executors to start: all, or the first `executors` of them."""
    return settings.executors if executors is None else settings.executors[:executors]


def _listened(settings: Settings, executors: int | None) -> dict[str, int]:
    active = [entry.name for entry in active_executors(settings, executors)]
    wanted = names.port_names(active, small_model=settings.models.small)
    return {name: settings.ports[name] for name in wanted if name in settings.ports}


def _make_folders(home: Home) -> None:
    home.root.mkdir(parents=True, exist_ok=True, mode=0o700)
    for folder in (home.secrets_dir, home.run_dir):
        folder.mkdir(exist_ok=True, mode=0o700)
        folder.chmod(0o700)
    for folder in (home.config_dir, home.postgres_dir.parent, home.nats_dir, home.artifacts_dir, home.logs_dir):
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)


def _check_space(root: Path) -> None:
    free = shutil.disk_usage(root).free
    if free < FREE_BYTES_MIN:
        raise FailedPrecondition(
            f"{root}: {free // 2**20} MiB are free on this disk, expected {FREE_BYTES_MIN // 2**20} MiB or more; "
            "make room, or choose a home elsewhere with --home",
            file=str(root),
        )


def _settle(
    home: Home,
    known: Settings | None,
    executors: int | None,
    models: ModelSettings,
    public: str,
    preferred_ports: bool,
    network: Network,
    addresses: tuple[str, ...],
) -> Settings:
    entries = list(known.executors if known else ())
    missing = range(len(entries) + 1, (executors or 1) + 1)
    entries += [ExecutorEntry(names.executor_name(number), new_id()) for number in missing]
    recorded = dict(known.ports) if known else {}
    wanted = names.port_names([entry.name for entry in entries], small_model=models.small)
    missing_ports = [name for name in wanted if name not in recorded]
    recorded |= network.pick_ports(missing_ports, recorded, preferred=preferred_ports, addresses=addresses)
    return Settings(
        owner=known.owner if known else new_id(),
        endpoints=_endpoints(home, recorded, network, public),
        ports=recorded,
        executors=tuple(entries),
        public=public,
        models=models,
        providers=known.providers if known else (),
        approval_ms=known.approval_ms if known else APPROVAL_MS,
    )


def _endpoints(home: Home, recorded: dict[str, int], network: Network, public: str) -> Endpoints:
    passfile = quote(str(home.secret_file(PASSFILE)), safe="")
    return Endpoints(
        http=f"http://{network.host(names.GATEWAY)}:{recorded['http']}",
        grpc=f"{network.host(names.GATEWAY)}:{recorded['grpc']}",
        nats=f"{'tls' if public else 'nats'}://{network.host(names.NATS)}:{recorded['nats']}",
        postgres=(
            f"postgresql://{SUPERUSER}@{network.host(names.POSTGRES)}:{recorded['postgres']}/{DATABASE}"
            f"?passfile={passfile}"
        ),
    )


def _make_secrets(home: Home) -> None:
    wanted = [SERVICE_KEY, POSTGRES_ADMIN]
    wanted += [postgres_secret(service) for service in names.SERVICES]
    for path in (home.api_key_file, *(home.secret_file(name) for name in wanted)):
        if not path.exists():
            write_private(path, secrets.token_urlsafe(_SECRET_BYTES) + "\n")
    if not home.kill_key_file.exists():
        from hive_common.control import keys as kill_keys

        write_private(home.kill_key_file, kill_keys.new_key())
    if not home.secret_file(TOKEN_KEY).exists():
        from hive_common.permissions.tokens import new_key

        write_private(home.secret_file(TOKEN_KEY), new_key() + "\n")
    ensure_author(home)
    password = read_secret(home.secret_file(POSTGRES_ADMIN))
    write_private(home.secret_file(PASSFILE), f"*:*:*:{SUPERUSER}:{password}\n")


def write_private(path: Path, text: str) -> None:
    """Write a file that only its owner may read, from its first byte on; whole or not at all."""
    replace_file(path, text.encode(), mode=0o600)


def to_raw(value: object) -> msgspec.Raw:
    """Return a JSON value for the `extra` of a configuration."""
    return msgspec.Raw(msgspec.json.encode(value))
