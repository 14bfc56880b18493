"""The configuration of an executor: a JSON file, decoded once into a frozen struct."""

from typing import Final

import msgspec
from hive_common.contracts.events import Tier
from hive_common.contracts.limits import MIB
from hive_common.inference.config import BackEndConfig
from hive_common.kernel.ids import is_id
from hive_common.ops.config import NatsConfig
from hive_common.ops.tls import check_listener

OLLAMA_URL: Final = "http://127.0.0.1:11434"
SPOOL_REPORTS_MAX: Final = 10_000
"""A pull names every spooled attempt, at some 65 bytes each, and NATS takes messages up to 1 MiB."""


class ExecutorConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What one executor needs to know.

    Args:
        name: for people; unique in an installation.
        executor_id: UUID made once per home; subjects and the inbox are named after it.
        nats: address and this executor's own credentials; their key also signs what the gateway is shown.
        state_dir: the spool and the lock of this one executor.
        cache_dir: blobs and compiled modules; executors of one user on one machine should share it.
        ops_port: loopback port of `/healthz`, `/readyz` and `/metrics`.
        token_public_key: verifies capability tokens; without it guests may compute, and no more.
        blobs_url: base URL of the gateway; when empty, the one that the registry's hello reply names.
        owner: pseudonym of the device's owner.
        slots: guests that run at the same time; 0 takes the number of cores.
        memory_bytes: what guests may use together; 0 takes half of the machine's memory.
        labels: shown in the capabilities, for placement.
        tier: class of the machine, for placement: `edge`, `worker` or `core`.
        device: names the machine in place of a hash of its id (`hive_executor.machine`): executors with one name
            count as one machine, and those with different names as several.
        battery_floor_percent: on battery at or below this, no new attempts are taken.
        model_urls: what may serve models on this device, Ollama or anything that speaks OpenAI's API: base URLs, or
            objects (`BackEndConfig`) where a key has to be shown or a CA of its own is to be trusted.
        models_port: port of 127.0.0.1 on which programs of this device reach all models; 0: none.
        models_counts_only: keep no prompts and no answers of calls that programs and guests of this device make.
        model_calls_max: calls of the pool that run here at once.
        prefetch_max: attempts beyond `slots` that may wait here, so that runners do not idle for a round trip.
        prefetch_ms: only as many are asked for as will start within this time, judged by recent attempts.
        spool_reports_max: outcomes on disk at which pulling stops.
        spool_bytes_max: their size at which pulling stops.
        cache_bytes_max: fetched blobs and modules kept in `cache_dir`.
        blob_timeout_ms: how long fetching an input or storing an output is tried before the attempt is given back.
        offline_stop_ms: without a renewed lease for so long, guests, which stand still since it ran out, are killed
            and given back.
        stop_grace_ms: how long running guests may go on after SIGTERM.
        report_interval_ms: how often capabilities are looked at again.
        kill_public_key: verifies kill orders; without it none is obeyed.
        engine_network: as in `ServiceConfig`.
    """

    name: str
    executor_id: str
    nats: NatsConfig
    state_dir: str
    cache_dir: str
    ops_port: int
    ops_host: str = "127.0.0.1"
    blobs_url: str = ""
    token_public_key: str = ""
    owner: str = ""
    slots: int = 0
    memory_bytes: int = 0
    labels: dict[str, str] = {}
    tier: Tier = "worker"
    device: str = ""
    battery_floor_percent: int = 20
    model_urls: tuple[str | BackEndConfig, ...] = (OLLAMA_URL,)
    models_port: int = 0
    models_counts_only: bool = False
    model_calls_max: int = 64
    prefetch_max: int = 128
    prefetch_ms: int = 100
    spool_reports_max: int = SPOOL_REPORTS_MAX
    spool_bytes_max: int = 64 * MIB
    cache_bytes_max: int = 1024 * MIB
    blob_timeout_ms: int = 60_000
    offline_stop_ms: int = 30_000
    stop_grace_ms: int = 1_000
    report_interval_ms: int = 30_000
    kill_public_key: str = ""
    engine_network: bool = False
    log_level: str = "INFO"

    def __post_init__(self) -> None:
        check_listener("ops_host", self.ops_host, engine_network=self.engine_network)
        if not is_id(self.executor_id):
            raise ValueError(f"executor_id is {self.executor_id!r}; expected a UUID in lower case")
        if not self.name:
            raise ValueError("name is empty; expected a name that people recognise")
        if self.slots < 0 or self.memory_bytes < 0 or self.prefetch_max < 0:
            raise ValueError("slots, memory_bytes and prefetch_max must not be negative")
        if not 1 <= self.spool_reports_max <= SPOOL_REPORTS_MAX:
            raise ValueError(f"spool_reports_max is {self.spool_reports_max}; expected 1 to {SPOOL_REPORTS_MAX}")
