"""What the router needs beyond `ServiceConfig`: the `extra` of its configuration."""

import msgspec
from hive_common.inference.config import BackEndConfig, CacheConfig
from hive_common.inference.providers import ProviderConfig, check_providers
from hive_common.kernel.errors import InvalidArgument
from hive_common.ops.config import ServiceConfig

from hive_router.domain.breaker import BreakerLimits
from hive_router.domain.selection import Weights


class RouterSettings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The `extra` of the router.

    Attributes:
        model_urls: what serves models on the gateway's host: base URLs, also with the file of a key to show there.
        host_executors: ids of the executors on that host, which serve the same models; the first one gives the
            host its name, power and region.
        weights, breaker: how back ends are scored, and when one is left alone.
        in_flight_max: calls that run at once at one back end; more wait.
        queue_max: calls that wait for one model; more are told to come later.
        refresh_ms: how often the models of the host are looked up.
        presence_ms: how often the scheduler is asked who is there.
        absent_ms: how long it has to say that a device is not, beyond the device's lease.
        credit: chunks that a device may be ahead of the caller.
        first_byte_ms: how long a device may say nothing before its first chunk.
        executor_calls_max, executor_bytes_max: calls that one executor may have here at once, and bytes of their
            bodies.
        records_max, record_bytes_max: finished calls that wait for the log, and bytes of them; more are dropped.
        explained_max: explanations kept in memory.
        providers: outside, which cost money.
        owner_key, owner_cloud: name of the owner's key, which the registry does not know, and whether jobs that
            were submitted with it may use providers.
        cache: of answers that are the same each time; without one, none is kept.
    """

    model_urls: tuple[str | BackEndConfig, ...] = ()
    host_executors: tuple[str, ...] = ()
    weights: Weights = Weights()
    breaker: BreakerLimits = BreakerLimits()
    in_flight_max: int = 128
    queue_max: int = 256
    refresh_ms: int = 5_000
    presence_ms: int = 1_000
    absent_ms: int = 3_000
    credit: int = 64
    first_byte_ms: int = 300_000
    executor_calls_max: int = 64
    executor_bytes_max: int = 32 * 1024 * 1024
    records_max: int = 10_000
    record_bytes_max: int = 64 * 1024 * 1024
    explained_max: int = 2_000
    providers: tuple[ProviderConfig, ...] = ()
    owner_key: str = ""
    owner_cloud: bool = False
    cache: CacheConfig | None = None


def settings_of(config: ServiceConfig) -> RouterSettings:
    """Decode `extra`. Raises InvalidArgument where a field is unknown, or not an HTTP URL."""
    try:
        settings = msgspec.json.decode(msgspec.json.encode(config.extra), type=RouterSettings)
    except msgspec.ValidationError as error:
        raise InvalidArgument(f"configuration of the router, extra: {error}", path="extra") from error
    for one in settings.model_urls:
        url = one if isinstance(one, str) else one.url
        if not url.startswith(("http://", "https://")):
            raise InvalidArgument(
                f"configuration of the router, extra.model_urls: got {url!r}; expected HTTP URLs",
                path="extra.model_urls",
            )
    check_providers(settings.providers, "configuration of the router, extra.providers")
    return settings
