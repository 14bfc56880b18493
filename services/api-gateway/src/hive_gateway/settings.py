"""What the gateway needs beyond `ServiceConfig`: the `extra` of its configuration."""

from typing import Literal

import msgspec
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import ServiceConfig

PEERS = ("scheduler", "registry", "audit", "router")


class KeySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One API key. `admin` may use everything, `executor` only blobs. The file has mode 0600."""

    name: str
    scope: Literal["admin", "executor"]
    file: str


class GatewaySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `extra` of the gateway. The public gRPC port is `grpc_host` and `grpc_port` of the configuration."""

    keys: tuple[KeySettings, ...]
    http_port: int
    http_host: str = "127.0.0.1"


def settings_of(config: ServiceConfig) -> GatewaySettings:
    """Decode `extra` and check what the gateway cannot do without.

    Raises:
        InvalidArgument: a field is missing, unknown or of the wrong type; there is no key; a peer is not named.
    """
    try:
        settings = msgspec.json.decode(msgspec.json.encode(config.extra), type=GatewaySettings)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"configuration of the gateway, extra: {error}", path="extra") from error
    if not settings.keys:
        raise InvalidArgument("configuration of the gateway, extra.keys: expected at least one key")
    for name in PEERS:
        if name not in config.peers:
            raise InvalidArgument(
                f"configuration of the gateway, peers: expected an address for `{name}`", path="peers"
            )
    return settings
