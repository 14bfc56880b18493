"""What the registry needs beyond `ServiceConfig`: the `extra` of its configuration."""

import msgspec
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import ServiceConfig


class RegistrySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `extra` of the registry.

    `blobs_url` is the base URL of the gateway as executors reach it, such as `http://127.0.0.1:8500`.
    """

    blobs_url: str


def settings_of(config: ServiceConfig) -> RegistrySettings:
    """Decode `extra`. Raises InvalidArgument where a field is missing, unknown or not an HTTP URL."""
    try:
        settings = msgspec.json.decode(msgspec.json.encode(config.extra), type=RegistrySettings)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"configuration of the registry, extra: {error}", path="extra") from error
    if not settings.blobs_url.startswith(("http://", "https://")):
        raise InvalidArgument(
            f"configuration of the registry, extra.blobs_url: got {settings.blobs_url!r}; expected an HTTP URL",
            path="extra.blobs_url",
        )
    return settings
