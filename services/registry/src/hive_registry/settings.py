"""What the registry needs beyond `ServiceConfig`: the `extra` of its configuration."""

import msgspec
from hive_common.bus.jwt import DAY_S
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import ServiceConfig


class LocalExecutor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An executor that this installation's supervisor runs: enrolled without a token. `public_key` is an nkey."""

    id: str
    name: str
    public_key: str


class AuthorKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The installation's own key for signing agents: trusted at start, unless something was decided about it."""

    name: str
    public_key: str


class IdentitySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What signs for executors, and what tells NATS whom it refuses. Files have mode 0600.

    Args:
        account: public nkey of the account that everybody is in.
        operator_seed_file: signs that account.
        executor_signer_seed_file: the scoped key that signs executors.
        system_credentials_file: credentials of `registry-system`.
        valid_s: how long credentials of executors are good.
    """

    account: str
    operator_seed_file: str
    executor_signer_seed_file: str
    system_credentials_file: str
    valid_s: int = DAY_S


class RegistrySettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `extra` of the registry.

    Args:
        blobs_url: base URL of the gateway as executors reach it, such as `http://127.0.0.1:8500`.
        nats_url: of NATS, likewise; empty for the one of `ServiceConfig`.
        local_executors: enrolled at start, with these keys.
        author_keys: trusted at start.
        identities: None where NATS is open, as in tests: nobody can be enrolled by a token, or renewed.
    """

    blobs_url: str
    nats_url: str = ""
    local_executors: tuple[LocalExecutor, ...] = ()
    author_keys: tuple[AuthorKey, ...] = ()
    identities: IdentitySettings | None = None


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
