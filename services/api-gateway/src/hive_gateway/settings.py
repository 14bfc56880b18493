"""What the gateway needs beyond `ServiceConfig`: the `extra` of its configuration."""

from typing import Literal

import msgspec
from hive_common.inference.calls import PIN_ANY
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import ServiceConfig
from hive_common.ops.tls import check_listener

PEERS = ("scheduler", "registry", "audit", "router")


class KeySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One API key, which may use everything. The file has mode 0600.

    Attributes:
        pin: where the data of its model calls may go: `own-devices`, `pool`, `region:<r>` or `any`.
        counts_only: keep no prompt and no completion of its model calls, only how much they used.
        cloud: its model calls may go to providers, within a budget.
    """

    name: str
    scope: Literal["admin"]
    file: str
    pin: str = PIN_ANY
    counts_only: bool = False
    cloud: bool = False


class KeyPair(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A certificate in PEM and its key, which has mode 0600."""

    cert_file: str
    key_file: str


class TlsSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Further listeners for REST and gRPC, on the same ports of other addresses, and with TLS."""

    hosts: tuple[str, ...]
    pair: KeyPair


class GatewaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `extra` of the gateway. The public gRPC port is `grpc_host` and `grpc_port` of the configuration.

    Attributes:
        keys: who may call.
        http_port: of REST.
        http_host: as `grpc_host`.
        public_url: base URL of REST for the machines that may join: over TLS, or on the loopback.
        ca_file: certificate of the installation's CA, for whoever wants to join; empty without `tls`.
        tls: listeners off the loopback.
    """

    keys: tuple[KeySettings, ...]
    http_port: int
    http_host: str = "127.0.0.1"
    public_url: str = ""
    ca_file: str = ""
    tls: TlsSettings | None = None
    ollama_without_key: bool = False
    """Programs of this machine may use the Ollama paths without a key, whose clients send none by themselves."""


def settings_of(config: ServiceConfig) -> GatewaySettings:
    """Decode `extra` and check what the gateway cannot do without.

    Raises:
        InvalidArgument: a field is missing, unknown or of the wrong type; there is no key; a peer is not named.
    """
    try:
        settings = msgspec.json.decode(msgspec.json.encode(config.extra), type=GatewaySettings)
        check_listener("http_host", settings.http_host, engine_network=config.engine_network)
    except ValueError as error:
        raise InvalidArgument(f"configuration of the gateway, extra: {error}", path="extra") from error
    if not settings.keys:
        raise InvalidArgument("configuration of the gateway, extra.keys: expected at least one key")
    for name in PEERS:
        if name not in config.peers:
            raise InvalidArgument(
                f"configuration of the gateway, peers: expected an address for `{name}`", path="peers"
            )
    return settings
