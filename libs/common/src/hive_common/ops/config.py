"""The configuration of a service: a JSON file, decoded once into a frozen struct."""

from pathlib import Path
from typing import TypeVar

import msgspec

from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.files import replace_file
from hive_common.ops.tls import check_listener


def role_of(service: str) -> str:
    """Return the login role of a service in Postgres."""
    return f"hive_{service}"


class PostgresConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where Postgres is and who connects. Passwords stand in files of mode 0600, never here."""

    host: str
    port: int
    user: str
    password_file: str
    database: str = "hive"

    def dsn(self) -> str:
        """Return a libpq connection string. It holds the password: never log it."""
        password = read_secret(self.password_file)
        return (
            f"host={self.host} port={self.port} dbname={self.database} user={self.user} "
            f"password={password} application_name={self.user} connect_timeout=5"
        )


class NatsConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where NATS is and who connects.

    Attributes:
        url: `nats://host:port`, or `tls://host:port`.
        credentials_file: user JWT and nkey seed, mode 0600; read at every connect, so that a renewed one counts.
        ca_file: certificates of which one must have signed the server's; where it is set, nothing goes unencrypted.
    """

    url: str
    credentials_file: str
    ca_file: str = ""


class ServiceConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What every service of the control plane needs.

    `peers` maps a service's name to the `host:port` of its gRPC server; `service_key_file` holds the key
    that services show each other. `token_public_key` verifies capability tokens (`hive_common.permissions.tokens`):
    without it none is good. `kill_public_key` verifies kill orders (`hive_common.control`): without it none is
    obeyed. `extra` is decoded by the service that it belongs to.

    Listeners without TLS stay on the loopback. With `engine_network`, which the containers of Compose set, they
    may have any address of the network that a container engine gives them.
    """

    service: str
    owner: str
    postgres: PostgresConfig
    nats: NatsConfig
    ops_port: int
    grpc_port: int
    service_key_file: str
    artifacts_dir: str
    ns: str = "default"
    ops_host: str = "127.0.0.1"
    grpc_host: str = "127.0.0.1"
    peers: dict[str, str] = {}
    kill_public_key: str = ""
    token_public_key: str = ""
    engine_network: bool = False
    log_level: str = "INFO"
    extra: dict[str, msgspec.Raw] = {}

    def __post_init__(self) -> None:
        check_listener("ops_host", self.ops_host, engine_network=self.engine_network)
        check_listener("grpc_host", self.grpc_host, engine_network=self.engine_network)


T = TypeVar("T")


def load_config(path: str | Path, kind: type[T]) -> T:
    """Decode a configuration file.

    Raises:
        InvalidArgument: the file is missing, is not JSON, or has a field that is unknown or of the wrong type.
    """
    file = Path(path)
    try:
        return msgspec.json.decode(file.read_bytes(), type=kind)
    except OSError as error:
        raise InvalidArgument(f"{file}: cannot be read: {error.strerror}", file=str(file)) from error
    except msgspec.DecodeError as error:
        raise InvalidArgument(f"{file}: {error}", file=str(file)) from error


def write_config(path: Path, config: msgspec.Struct) -> None:
    """Write a configuration so that people can read it; whole or not at all."""
    replace_file(path, msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")


def read_secret(path: str | Path) -> str:
    """Read a secret from its file.

    Raises:
        InvalidArgument: it cannot be read, is empty, or others than its owner may read it.
    """
    file = Path(path)
    try:
        mode = file.stat().st_mode
        secret = file.read_text().strip()
    except OSError as error:
        raise InvalidArgument(f"{file}: cannot be read: {error.strerror}", file=str(file)) from error
    if mode & 0o077:
        raise InvalidArgument(f"{file}: others may read it; run: chmod 600 {file}", file=str(file))
    if not secret:
        raise InvalidArgument(f"{file}: is empty", file=str(file))
    return secret
