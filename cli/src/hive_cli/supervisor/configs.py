"""Writes the configuration of every process, anew at each start, from the home's settings."""

import os
import shutil
from pathlib import Path
from typing import Any

import psutil
from hive_common.control import keys as kill_keys
from hive_common.ops.config import NatsConfig, PostgresConfig, ServiceConfig, read_secret, role_of, write_config
from hive_common.permissions.tokens import public_key
from hive_executor.config import ExecutorConfig

from hive_cli.author_keys import AUTHOR
from hive_cli.author_keys import public_key as public_key_of
from hive_cli.home import ExecutorEntry, Home, Settings, providers_of
from hive_cli.model_servers import Urls
from hive_cli.supervisor import certificates, names
from hive_cli.supervisor.identities import credentials_name, issue, registry_settings, trust
from hive_cli.supervisor.nats_conf import render, store_bytes
from hive_cli.supervisor.network import LOOPBACK, Network
from hive_cli.supervisor.provision import (
    DATABASE,
    SERVICE_KEY,
    TOKEN_KEY,
    postgres_secret,
    to_raw,
    write_private,
)
from hive_cli.supervisor.public import listened, nats_for_others, nats_host, url_for_others
from hive_cli.supervisor.small_model import with_small_model, write_small_model

OWNER_KEY = "owner"


def write_configs(
    home: Home,
    settings: Settings,
    executors: tuple[ExecutorEntry, ...],
    cache_dir: Path,
    network: Network = LOOPBACK,
) -> None:
    """Write `config/*.json`, `config/nats.conf` and `prometheus.yml`, and credentials for NATS.

    Args:
        home: already provisioned.
        settings: of this home.
        executors: those that will be started.
        cache_dir: shared by the executors of this user.
        network: that the processes will meet in.
    """
    issue(home, settings)
    write_private(home.nats_config_file, _nats(home, settings, network))
    for service in names.SERVICES:
        write_config(home.config_file(service), _service(home, settings, service, network))
    for entry in executors:
        config = _executor(home, settings, entry, len(executors), cache_dir, network)
        write_config(home.config_file(entry.name), config)
    if settings.models.small:
        write_small_model(home, settings.ports, network)
    home.prometheus_file.write_text(_prometheus(settings, executors, network))


def _nats(home: Home, settings: Settings, network: Network) -> str:
    stored = sum(path.stat().st_size for path in home.nats_dir.rglob("*") if path.is_file())
    return render(
        host=nats_host(settings.public) if settings.public else network.listen,
        port=settings.ports["nats"],
        monitor_port=settings.ports["nats_monitor"],
        store_dir=home.nats_dir,
        trust=trust(home),
        # In containers the store is a volume of its own, which only the server sees.
        tls=certificates.files(home, names.NATS) if settings.public else None,
        engine_network=network.by_name,
        store_bytes_max=None if network.by_name else store_bytes(shutil.disk_usage(home.nats_dir).free, stored),
    )


def _service(home: Home, settings: Settings, service: str, network: Network) -> ServiceConfig:
    return ServiceConfig(
        service=service,
        owner=settings.owner,
        postgres=PostgresConfig(
            host=network.host(names.POSTGRES),
            port=settings.ports["postgres"],
            user=role_of(service),
            password_file=str(home.secret_file(postgres_secret(service))),
            database=DATABASE,
        ),
        nats=_nats_config(home, settings, service),
        ops_host=network.listen,
        ops_port=settings.ports[names.ops_port(service)],
        grpc_host=network.listen,
        grpc_port=settings.ports[names.grpc_port(service)],
        service_key_file=str(home.secret_file(SERVICE_KEY)),
        artifacts_dir=str(home.artifacts_dir),
        token_public_key=_token_public_key(home),
        kill_public_key=_kill_public_key(home),
        engine_network=network.by_name,
        peers={
            peer: f"{network.host(peer)}:{settings.ports[names.grpc_port(peer)]}"
            for peer in names.PEERS
            if peer != service
        },
        extra={name: to_raw(value) for name, value in _extra(home, settings, service, network).items()},
    )


def _extra(home: Home, settings: Settings, service: str, network: Network) -> dict[str, Any]:
    if service == names.REGISTRY:
        reached = {"blobs_url": url_for_others(settings), "nats_url": nats_for_others(settings)}
        author = {"name": AUTHOR, "public_key": public_key_of(home, AUTHOR)}
        return reached | registry_settings(home, settings) | {"author_keys": [author]}
    if service == names.GATEWAY:
        models = settings.models
        owner = {"name": OWNER_KEY, "scope": "admin", "file": str(home.api_key_file)}
        keys = [owner | {"pin": models.pin, "counts_only": models.counts_only, "cloud": models.cloud}]
        return {
            "http_host": network.listen,
            "http_port": settings.ports["http"],
            "keys": keys,
            "ollama_without_key": models.ollama_without_key,
            "public_url": url_for_others(settings),
            **(_doors(home, settings) if settings.public else {}),
        }
    if service == names.ROUTER:
        host = [entry.id for entry in settings.executors]
        return {
            "model_urls": _model_urls(settings),
            "host_executors": host,
            "providers": providers_of(settings, home),
            "owner_key": OWNER_KEY,
            "owner_cloud": settings.models.cloud,
            "cache": settings.models.cache,
        }
    if service == names.SCHEDULER:
        return {"token_key_file": str(home.secret_file(TOKEN_KEY)), "approval_ms": settings.approval_ms}
    return {}


def _doors(home: Home, settings: Settings) -> dict[str, Any]:
    own = certificates.files(home, names.GATEWAY)
    return {
        "ca_file": str(home.ca_file),
        "tls": {
            "hosts": listened(settings.public),
            "pair": {"cert_file": str(own.certificate), "key_file": str(own.key)},
        },
    }


def _executor(
    home: Home, settings: Settings, entry: ExecutorEntry, count: int, cache_dir: Path, network: Network
) -> ExecutorConfig:
    # Executors of one machine share it; each would otherwise offer all of it.
    return ExecutorConfig(
        name=entry.name,
        executor_id=entry.id,
        nats=_nats_config(home, settings, entry.name),
        state_dir=str(home.executor_dir(entry.name)),
        cache_dir=str(cache_dir),
        ops_host=network.listen,
        ops_port=settings.ports[names.ops_port(entry.name)],
        blobs_url=settings.endpoints.http,
        engine_network=network.by_name,
        owner=settings.owner,
        slots=max(1, (os.cpu_count() or 1) // count),
        memory_bytes=psutil.virtual_memory().total // 2 // count,
        labels=entry.labels,
        tier=entry.tier,
        device=entry.device,
        model_urls=_model_urls(settings),
        models_counts_only=settings.models.counts_only,
        token_public_key=_token_public_key(home),
        kill_public_key=_kill_public_key(home),
    )


def _kill_public_key(home: Home) -> str:
    file = str(home.kill_key_file)
    return kill_keys.public_text(kill_keys.private_key(read_secret(file), file))


def _token_public_key(home: Home) -> str:
    return public_key(read_secret(home.secret_file(TOKEN_KEY)))


def _model_urls(settings: Settings) -> Urls:
    return with_small_model(settings.models.urls, settings.ports, settings.models.small)


def _nats_config(home: Home, settings: Settings, identity: str) -> NatsConfig:
    ca_file = str(home.ca_file) if settings.public else ""
    return NatsConfig(settings.endpoints.nats, str(home.secret_file(credentials_name(identity))), ca_file)


def _prometheus(settings: Settings, executors: tuple[ExecutorEntry, ...], network: Network) -> str:
    small = (names.SMALL_MODEL,) if settings.models.small else ()
    targets = "".join(
        f'      - targets: ["{network.host(name)}:{settings.ports[names.ops_port(name)]}"]\n'
        f"        labels: {{process: {name}}}\n"
        for name in (*names.SERVICES, *(entry.name for entry in executors), *small)
    )
    return f"""# Written by `hive up`; changes are lost. Start with: prometheus --config.file=prometheus.yml
global:
  scrape_interval: 5s
scrape_configs:
  - job_name: hivefabric
    static_configs:
{targets}"""
